"""How an attention call lays its tensors out, and the one order everything else uses.

Canonical order: [row, window, head, .., ..] where a row is one image of one copy. Models use at least five others:
(B, h, N, D); (B*W, h, S, D) with W windows (Swin); (B, h, W, S, D) (Hiera); (B, W, h, S, D) (Twins); (B*h, N, D)
(SAM, `nn.MultiheadAttention`).
"""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["CallLayout", "TokenLayout"]


@dataclass(frozen=True)
class CallLayout:
    """Where the heads are among the leading dimensions of q, k, v, weights and output.

    `axis` is the head axis of the unfolded tensor; `folded`: heads are folded into the first dimension.
    """

    heads: int
    axis: int = 1
    folded: bool = False

    def canonical(self, tensor: Tensor, rows: int) -> Tensor:
        """[.., a, b] as the model has it -> [row, window, head, a, b]; a view where strides allow."""
        if self.folded:
            tensor = tensor.unflatten(0, (-1, self.heads))
        tensor = tensor.movedim(self.axis, -3)
        return tensor.reshape(rows, -1, *tensor.shape[-3:])

    def original(self, canonical: Tensor, like: Tensor) -> Tensor:
        """The inverse of `canonical`; `like` has the leading dimensions of the model's own tensor."""
        lead = (like.shape[0] // self.heads, self.heads, *like.shape[1:-2]) if self.folded else like.shape[:-2]
        moved = [size for axis, size in enumerate(lead) if axis != self.axis]
        tensor = canonical.reshape(*moved, *canonical.shape[-3:]).movedim(-3, self.axis)
        return tensor.flatten(0, 1) if self.folded else tensor


@dataclass(frozen=True)
class TokenLayout:
    """How a block lays its tokens out: "NLC", "LNC", "NHWC" or "NCHW" (N images, L tokens, C channels)."""

    order: str

    def canonical(self, tensor: Tensor) -> Tensor:
        """-> [image, token, channel]."""
        match self.order:
            case "NLC":
                return tensor
            case "LNC":
                return tensor.transpose(0, 1)
            case "NHWC":
                return tensor.flatten(1, 2)
            case "NCHW":
                return tensor.flatten(2).transpose(1, 2)
        raise AssertionError(self.order)

    def original(self, canonical: Tensor, like: Tensor) -> Tensor:
        """The inverse of `canonical`, in the shape of `like` (of one image or several)."""
        match self.order:
            case "NLC":
                return canonical
            case "LNC":
                return canonical.transpose(0, 1)
            case "NHWC":
                return canonical.reshape(canonical.shape[0], *like.shape[1:3], -1)
            case "NCHW":
                return canonical.transpose(1, 2).reshape(canonical.shape[0], -1, *like.shape[2:4])
        raise AssertionError(self.order)

    @property
    def token_axis(self) -> int | None:
        """The axis that tokens lie on, where there is one."""
        return {"NLC": 1, "LNC": 0}.get(self.order)
