"""WinT in one file: a plain vision transformer whose patches predict the windows that they attend within.

Read it from the top: tokens -> sides of windows -> mask -> attention -> block -> model. After Ma et al. 2022 (arXiv
2203.05922); what a window head looks like and how its mask is made is our construction.

A window reaches `sides` = (left, top, right, bottom) patches from its query; it always holds the query, and prefix
tokens (class token, registers) see everything and are seen by all. While training, windows have soft edges, so that
gradients reach their sides; in evaluation, and towards the end of training, sides are rounded and edges are hard,
unless the model is asked to keep soft ones (`edges`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrail.arguments import number_below
from vitrail.errors import Unsupported, UsageError
from vitrail.grid import Grid, positions
from vitrail.patches import windows
from vitrail.tap.clone import clone_sharing

__all__ = [
    "FULL",
    "Architecture",
    "FixedWindows",
    "Shape",
    "WinT",
    "WindowHead",
    "attach",
    "attention_bias",
    "hard_mask",
    "moved_windows",
    "record_sides",
    "round_sides",
    "set_temperature",
    "soft_bias",
    "soft_edges",
    "soft_mask",
    "window_heads",
    "windowed_attention",
]

Sides = Float[Tensor, "image window patch side"]
"""How far each window reaches from its query: patches left, top, right, bottom. One window a head, or one for all."""

Start = Sequence[Sequence[float]]
"""Where windows begin: for each window of a layer, sides as a share of the longest possible, n - 1."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Grid, int], Tensor]
"""(q, k, v, sides, grid, prefix) to the heads' output [image head token channel], with hard windows."""

FULL: Start = ((0.982, 0.982, 0.982, 0.982),)
"""One window for all heads that covers the grid after rounding, up to 28 x 28 patches: sigmoid(4). A trained ViT with
this start answers as before."""

CLOSED = -1e4
"""Added to the scores of rows and columns that a window is cut at: attention to them is 0, and no sum overflows."""

FLOOR = 1e-6
"""How open a closed row or column of patches still is: attention to it costs 13.8 of score, 27.6 if both are closed."""


# --- windows and masks -----------------------------------------------------------------------------------------------


class WindowHead(nn.Module):
    """Predicts windows from a layer's normalised tokens: b = (n - 1) sigmoid(W2 gelu(W1 t)).

    W2 begins at zero, so that at first all patches have the windows `start` and content counts as far as it helps.
    """

    def __init__(self, width: int, start: Start = FULL, edges: float = 0.0, cut: float = 0.0) -> None:
        super().__init__()
        share = torch.tensor([list(sides) for sides in start if len(sides) == 4], dtype=torch.float32)
        if not len(share) == len(start) > 0 or not bool(((share > 0) & (share < 1)).all()):
            raise UsageError(f"Windows start at four shares in 0..1 each (left, top, right, bottom), not at {start}.")
        self.n_windows = len(share)
        self.hidden = nn.Linear(width, max(4, width // 4))
        self.sides = nn.Linear(self.hidden.out_features, share.numel())
        nn.init.zeros_(self.sides.weight)
        with torch.no_grad():
            self.sides.bias.copy_(share.logit().flatten())
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()), persistent=False)
        self.edges = edges
        """The temperature of edges in evaluation; 0: hard."""
        self.cut = cut
        """Rows and columns of patches that soft edges let through by less are closed; 0: none."""
        self.hard: bool | None = None
        """Whether edges are hard; None: in evaluation, unless `edges` says otherwise. While training, hard windows keep
        the soft ones' gradient."""
        self.record: list[Tensor] | None = None
        self.change: Callable[[Tensor], Tensor] | None = None

    def forward(self, tokens: Float[Tensor, "image patch channel"], grid: Grid) -> Sides:
        """Predicts how far each patch sees.

        Args:
            tokens: Normalised tokens of patches, without the prefix.
            grid: Rows and columns of patches.

        Returns:
            Patches left, top, right, bottom of each query, 0 to n - 1, float32 or wider.
        """
        raw = self.sides(F.gelu(self.hidden(tokens)))
        share = _at_least_float32(raw).sigmoid().unflatten(-1, (self.n_windows, 4)).transpose(1, 2)
        sides: Tensor = share * max_sides(grid, share)
        if self.change is not None:
            sides = self.change(sides)
        if self.record is not None:
            self.record.append(sides)
        return sides

    def mask(
        self, tokens: Float[Tensor, "image patch channel"], grid: Grid
    ) -> Float[Tensor, "image window q k"] | None:
        """Turns predicted windows into what is added to the scores between patches.

        Args:
            tokens: Normalised tokens of patches, without the prefix.
            grid: Rows and columns of patches.

        Returns:
            0 where a key is open. Elsewhere -inf with hard edges (`CLOSED` while training), with soft ones down to
            2 log(1e-6) and below `CLOSED` where it is cut. None if every window is full.
        """
        sides = self(tokens, grid)
        if not self.training and self.is_hard:
            mask = hard_mask(sides, grid)
            return None if bool(mask.all()) else _hard_bias(mask)
        temperature = self.temperature if self.training or not self.edges else self.edges
        soft = soft_bias(sides, grid, temperature, self.cut)
        if not self.is_hard:
            return soft
        closed = ~hard_mask(sides, grid)
        return (soft - soft.detach()).masked_fill(closed, CLOSED)  # the soft edges' gradient, where keys are open

    @property
    def is_hard(self) -> bool:
        """Whether edges are hard now."""
        return not self.training and not self.edges if self.hard is None else self.hard


class FixedWindows(nn.Module):
    """Windows that nobody predicts: the control. Sides are given in patches and are the same for every patch."""

    def __init__(self, sides: Start) -> None:
        super().__init__()
        if not all(len(window) == 4 and min(window) >= 0 for window in sides):
            raise UsageError(f"Fixed windows have four sides of 0 or more (left, top, right, bottom), not {sides}.")
        self.n_windows = len(sides)
        self.sides = tuple(tuple(float(side) for side in window) for window in sides)
        self.record: list[Tensor] | None = None
        self.change: Callable[[Tensor], Tensor] | None = None

    def forward(self, tokens: Float[Tensor, "image patch channel"], grid: Grid) -> Sides:
        """Repeats the windows for every image and patch.

        Args:
            tokens: Tokens of patches, which say how many there are.
            grid: Rows and columns of patches.

        Returns:
            Patches left, top, right, bottom of each query.
        """
        sides = torch.tensor(self.sides, device=tokens.device)[None, :, None]
        sides = sides.expand(len(tokens), -1, tokens.shape[1], -1)
        if self.change is not None:
            sides = self.change(sides)
        if self.record is not None:
            self.record.append(sides)
        return sides

    def mask(self, tokens: Float[Tensor, "image patch channel"], grid: Grid) -> Float[Tensor, "one window q k"] | None:
        """Turns the windows into what is added to the scores between patches, the same for all images.

        Args:
            tokens: Tokens of patches, which say how many there are.
            grid: Rows and columns of patches.

        Returns:
            0 where a key is open, -inf elsewhere; None if every window is full.
        """
        sides = self(tokens[:1], grid)
        most = (grid[1] - 1, grid[0] - 1)
        full = all(side + 0.5 >= most[index % 2] for window in self.sides for index, side in enumerate(window))
        full = full and self.change is None  # read off the settings, so that compiled training does not wait for sides
        return None if full else _hard_bias(hard_mask(sides, grid))


def soft_mask(
    sides: Float[Tensor, "*batch patch side"], grid: Grid, temperature: float | Float[Tensor, ""]
) -> Float[Tensor, "*batch patch other"]:
    """Opens windows with soft edges: the product of sigmoids over four edges; 1 for the query itself.

    Args:
        sides: Patches left, top, right, bottom of each query.
        grid: Rows and columns of patches.
        temperature: The sigmoid's unit, in patches.

    Returns:
        How open each patch is to each query, 0 to 1.
    """
    left, top, right, bottom = sides.unsqueeze(-1).unbind(-2)
    down, across = _offsets(grid, sides)
    open_across = ((left + across + 0.5) / temperature).sigmoid() * ((right - across + 0.5) / temperature).sigmoid()
    open_down = ((top + down + 0.5) / temperature).sigmoid() * ((bottom - down + 0.5) / temperature).sigmoid()
    mask = (open_down.unsqueeze(-1) * open_across.unsqueeze(-2)).flatten(-2)
    return mask.masked_fill(_identity(mask), 1.0)


def soft_edges(
    sides: Float[Tensor, "*batch patch side"], grid: Grid, temperature: float | Float[Tensor, ""], cut: float = 0.0
) -> Float[Tensor, "*batch patch line"]:
    """Turns windows with soft edges into what each line of patches, row or column, adds to a query's scores.

    A window is a product over edges, so its logarithm is the sum of what a key's row and what its column add.

    Args:
        sides: Patches left, top, right, bottom of each query.
        grid: Rows and columns of patches.
        temperature: The sigmoid's unit, in patches.
        cut: Lines that are less open than this are closed altogether.

    Returns:
        For each row, then for each column: 0 where it is open, down to log(1e-6); `CLOSED` beyond the cut.
    """
    left, top, right, bottom = sides.unsqueeze(-1).unbind(-2)
    down, across = _offsets(grid, sides)
    rows = _log_open((top + down + 0.5) / temperature, (bottom - down + 0.5) / temperature, cut)
    columns = _log_open((left + across + 0.5) / temperature, (right - across + 0.5) / temperature, cut)
    return torch.cat((rows, columns), -1)


def soft_bias(
    sides: Float[Tensor, "*batch patch side"], grid: Grid, temperature: float | Float[Tensor, ""], cut: float = 0.0
) -> Float[Tensor, "*batch patch other"]:
    """Turns windows with soft edges into what is added to scores: the logarithm of the `soft_mask`, of which rows and
    columns are each at least 1e-6.

    Args:
        sides: Patches left, top, right, bottom of each query.
        grid: Rows and columns of patches.
        temperature: The sigmoid's unit, in patches.
        cut: Rows and columns that are less open than this are closed altogether.

    Returns:
        0 where a key is open, and for the query itself; down to 2 log(1e-6), far below where it is cut.
    """
    edges = soft_edges(sides, grid, temperature, cut)
    with torch.autocast(sides.device.type, enabled=False):
        log_mask = edges @ _lines_of_patches(grid, edges).mT
    return log_mask.masked_fill(_identity(log_mask), 0.0)


def windowed_attention(
    q: Float[Tensor, "image head token channel"],
    k: Float[Tensor, "image head token channel"],
    v: Float[Tensor, "image head token channel"],
    edges: Float[Tensor, "image window patch line"] | None = None,
    grid: Grid = (0, 0),
    bias: Float[Tensor, "#image #window query key"] | None = None,
) -> Float[Tensor, "image head token channel"]:
    """Attends within soft windows without a mask: what lines of patches add to scores are more channels of q, and which
    row and column a key lies in are more channels of k, so that one product holds both.

    A mask is a number for each pair of patches, head and image in each layer; this is one for each patch and line.
    `docs/wint.md` has what it saves on a CPU.

    Args:
        q: Queries; the last tokens are patches.
        k: Keys.
        v: Values.
        edges: `soft_edges`, of one window for all heads or of one a head; None for no windows.
        grid: Rows and columns of patches.
        bias: Added to scores, for windows that are no sums of rows and columns.

    Returns:
        What each head takes for each token.
    """
    q = q * q.shape[-1] ** -0.5
    if edges is None:
        scores = _at_least_float32(q @ k.mT)
    else:
        lines, edges = _lines_of_patches(grid, q), edges.to(q.dtype)
        prefix = q.shape[2] - len(lines)
        more_q = F.pad(edges, (0, 0, prefix, 0)).expand(*q.shape[:3], -1)
        more_k = F.pad(lines, (0, 0, prefix, 0)).expand(*k.shape[:3], -1)
        scores = _at_least_float32(torch.cat((q, more_q), -1) @ torch.cat((k, more_k), -1).mT)
        own = F.pad((edges * lines).sum(-1), (prefix, 0))  # the query sees itself
        scores = scores - torch.diag_embed(own.to(scores.dtype))
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).to(v.dtype) @ v


def hard_mask(sides: Float[Tensor, "*batch patch side"], grid: Grid) -> Bool[Tensor, "*batch patch other"]:
    """Opens windows with hard edges; the query itself always lies in its window.

    Args:
        sides: Patches left, top, right, bottom of each query; rounded here.
        grid: Rows and columns of patches.

    Returns:
        Whether each patch lies in each query's window.
    """
    return windows.masks(windows.boxes_of_sides(round_sides(sides), grid), grid)


def round_sides(sides: Float[Tensor, "*batch side"]) -> Float[Tensor, "*batch side"]:
    """Rounds sides to whole patches; halves go up, which is where a soft edge is more than half open.

    Args:
        sides: In patches.

    Returns:
        Whole numbers, of the same type.
    """
    return (sides + 0.5).floor()


def attention_bias(
    mask: Float[Tensor, "#image window patch other"] | None, prefix: int, like: Tensor
) -> Float[Tensor, "#image window query key"] | None:
    """Widens an addition to scores from patches to all tokens; rows and columns of the prefix are open.

    Args:
        mask: What is added between patches; None for nothing.
        prefix: Number of prefix tokens.
        like: A tensor of the type that is needed.

    Returns:
        What is added between all tokens; None for nothing.
    """
    return None if mask is None else F.pad(mask.to(like.dtype), (prefix, 0, prefix, 0))


def max_sides(grid: Grid, like: Tensor) -> Float[Tensor, "side"]:
    """Gives the longest sides of a grid.

    Args:
        grid: Rows and columns of patches.
        like: A tensor of the type and device that are needed.

    Returns:
        n - 1 patches left, top, right and bottom.
    """
    rows, columns = grid
    return like.new_tensor([columns - 1, rows - 1, columns - 1, rows - 1])


def _offsets(grid: Grid, like: Tensor) -> tuple[Float[Tensor, "patch row"], Float[Tensor, "patch column"]]:
    """How many patches each row lies below, and each column right of, each patch."""
    row, column = positions(grid, partial(torch.arange, device=like.device))
    down = torch.arange(grid[0], device=like.device) - row[:, None]
    across = torch.arange(grid[1], device=like.device) - column[:, None]
    return down.to(like.dtype), across.to(like.dtype)


def _log_open(first: Tensor, second: Tensor, cut: float) -> Tensor:
    """log(sigmoid(first) sigmoid(second)), at least the floor, so that no gradient is 0 / 0. Compilers vectorise it,
    unlike `logsigmoid`."""
    is_open = first.sigmoid() * second.sigmoid()
    log_open = is_open.clamp(min=FLOOR).log()
    return torch.where(is_open < cut, CLOSED, log_open) if cut else log_open


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _lines_of_patches(grid: Grid, like: Tensor) -> Float[Tensor, "patch line"]:
    """For each patch 1 at its row and at its column: rows first, then columns."""
    rows, columns = (torch.eye(n, dtype=like.dtype, device=like.device) for n in grid)
    return torch.cat((rows.repeat_interleave(grid[1], 0), columns.repeat(grid[0], 1)), -1)


def _identity(mask: Tensor) -> Bool[Tensor, "patch other"]:
    return torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


def _hard_bias(mask: Bool[Tensor, "*batch patch other"]) -> Float[Tensor, "*batch patch other"]:
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)


# --- the transformer -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """What a WinT is made of, whatever images it is given.

    windows: "predicted", "fixed" (sides in patches) or "none", a plain ViT. start: for each window of a layer its four
    sides, one window for all heads or one a head; shares of n - 1 where they are predicted. drop_path_rate: of
    stochastic depth, growing from 0 in the first layer to this in the last.
    """

    patch_px: int = 4
    width: int = 96
    depth: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    class_token: bool = True
    drop_path_rate: float = 0.0
    windows: str = "predicted"
    start: tuple[tuple[float, ...], ...] = ((0.38, 0.38, 0.38, 0.38),)


@dataclass(frozen=True)
class Shape(Architecture):
    """An architecture for images of one size and a number of classes; goes into config.json as it is.

    image_px: (rows, columns). edges: the temperature of predicted windows' edges in evaluation, in patches; 0: rounded,
    with hard edges. cut: rows and columns of patches that soft edges let through by less than this are closed.
    """

    image_px: tuple[int, int] = (32, 32)
    n_classes: int = 10
    edges: float = 0.0
    cut: float = 0.0

    def __post_init__(self) -> None:
        if self.windows not in ("predicted", "fixed", "none"):
            raise UsageError(f"windows = {self.windows!r} has no meaning; choose predicted, fixed or none.")
        if min(self.patch_px, self.width, self.depth, self.heads, int(self.width * self.mlp_ratio), *self.image_px) < 1:
            raise UsageError(
                f"patch_px = {self.patch_px}, width = {self.width}, depth = {self.depth}, heads = {self.heads}, "
                f"mlp_ratio = {self.mlp_ratio} and images of {self.image_px} px make no model; give 1 or more of each."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise UsageError(f"drop_path_rate = {self.drop_path_rate} has no meaning; give a share below 1.")
        if self.width % self.heads:
            raise UsageError(f"A width of {self.width} cannot be shared between {self.heads} heads; it must divide.")
        if any(side % self.patch_px for side in self.image_px):
            raise UsageError(f"Images of {self.image_px} px cannot be cut into patches of {self.patch_px} px.")
        if self.n_classes < 0:
            raise UsageError(f"n_classes = {self.n_classes} has no meaning; give a number of classes, or 0 for none.")
        if not 0 <= self.edges < float("inf"):
            raise UsageError(f"Edges of windows cannot be {self.edges} patches soft; give 0 for hard ones, or more.")
        if not 0 <= self.cut < 1:
            raise UsageError(f"Soft windows cannot be cut at {self.cut}; give a share from 0 to below 1.")
        if self.windows != "none" and len(self.start) not in (1, self.heads):
            raise UsageError(f"{len(self.start)} windows a layer were asked for; give 1 or {self.heads}, one a head.")

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        return self.image_px[0] // self.patch_px, self.image_px[1] // self.patch_px


class Attention(nn.Module):
    """Self-attention of all tokens; patches see each other within their windows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads, self.prefix, self.grid = shape.heads, int(shape.class_token), shape.grid
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)
        self.windows: WindowHead | FixedWindows | None = None
        self.kernel: Kernel | None = None
        """What attends within windows instead of `scaled_dot_product_attention` with a mask (`vitrail.wint.sparse`)."""

    def forward(self, tokens: Float[Tensor, "image token channel"]) -> Float[Tensor, "image token channel"]:
        """What each token takes from those it may see, after the output projection."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kernel is not None and self.windows is not None:
            heads = self.kernel(q, k, v, self.windows(tokens[:, self.prefix :], self.grid), self.grid, self.prefix)
            return self.proj(heads.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
        heads = self._attend(q, k, v, tokens[:, self.prefix :])
        out: Tensor = self.proj(heads.transpose(1, 2).flatten(2))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, patches: Tensor) -> Tensor:
        """What heads take. Training on a CPU has products of its own: a mask with a gradient costs more there, and in
        bfloat16 PyTorch's kernel takes five times as long as plain products."""
        windows, slow_kernels = self.windows, self.training and q.device.type == "cpu"
        if slow_kernels and isinstance(windows, WindowHead) and not windows.is_hard:
            edges = soft_edges(windows(patches, self.grid), self.grid, windows.temperature, windows.cut)
            return windowed_attention(q, k, v, edges, self.grid)
        mask = None if windows is None else windows.mask(patches, self.grid)
        bias = attention_bias(mask, self.prefix, q)
        if slow_kernels and q.dtype == torch.bfloat16:
            return windowed_attention(q, k, v, bias=bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Block(nn.Module):
    """Attention and MLP, each on normalised tokens and added to them."""

    def __init__(self, shape: Shape, drop_rate: float) -> None:
        super().__init__()
        hidden = int(shape.width * shape.mlp_ratio)
        self.norm1 = nn.LayerNorm(shape.width, eps=1e-6)
        self.attn = Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(shape.width, hidden), nn.GELU(), nn.Linear(hidden, shape.width))
        self.drop_rate = drop_rate

    def forward(self, tokens: Float[Tensor, "image token channel"]) -> Float[Tensor, "image token channel"]:
        """The tokens of the next layer."""
        tokens = tokens + self._drop_path(self.attn(self.norm1(tokens)))
        return tokens + self._drop_path(self.mlp(self.norm2(tokens)))

    def _drop_path(self, branch: Tensor) -> Tensor:
        """Stochastic depth: in training a branch is left out for some images, and made up for in the others."""
        if not self.training or self.drop_rate == 0:
            return branch
        survives = torch.rand((len(branch), 1, 1), device=branch.device) >= self.drop_rate
        return branch * survives / (1 - self.drop_rate)


class WinT(nn.Module):
    """A vision transformer with predicted, fixed or no windows. `shape.windows = "none"` is the plain ViT.

    The window heads are drawn last: models of one seed that differ only in `windows` have the same weights elsewhere.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.img_size, self.num_classes = shape.image_px, shape.n_classes
        self.patch_embed = nn.Conv2d(3, shape.width, shape.patch_px, shape.patch_px)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width)) if shape.class_token else None
        n_tokens = int(shape.class_token) + shape.grid[0] * shape.grid[1]
        self.positions = nn.Parameter(torch.zeros(1, n_tokens, shape.width))
        rates = torch.linspace(0, shape.drop_path_rate, shape.depth).tolist()
        self.blocks = nn.ModuleList(Block(shape, rate) for rate in rates)
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, shape.n_classes) if shape.n_classes else nn.Identity()
        self._init_weights()
        for attention in [module for module in self.modules() if isinstance(module, Attention)]:
            attention.windows = _build_windows(shape)

    def forward(self, images: Float[Tensor, "image channel row column"]) -> Float[Tensor, "image class"]:
        """Classifies images.

        Args:
            images: Normalised.

        Returns:
            Logits; the pooled feature of a model without classes, [image channel].
        """
        patches = self.patch_embed(images).flatten(2).mT.contiguous()  # else compiled in bfloat16 gradients are NaN
        prefix = [] if self.cls_token is None else [self.cls_token.expand(len(patches), -1, -1)]
        tokens = torch.cat([*prefix, patches], 1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        pooled = tokens[:, 0] if self.shape.class_token else tokens.mean(1)
        logits: Tensor = self.head(pooled)
        return logits

    def no_weight_decay(self) -> set[str]:
        """Names the parameters that weight decay spares (timm's optimisers ask for them).

        Returns:
            Tokens, positions and the windows' start, which a decay would pull to places without meaning.
        """
        return {"cls_token", "positions", *(name for name, _ in self.named_parameters() if name.endswith("sides.bias"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Tells which parameters are of which layer (timm's decay of the learning rate by layer asks for it).

        Args:
            coarse: Whether few groups are enough; they are the same.

        Returns:
            Patterns of names: of the stem, and of blocks and the norm after them; the classifier comes last.
        """
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^(?:cls_token|positions|patch_embed)", "blocks": blocks}

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.positions, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)


def _build_windows(shape: Shape) -> WindowHead | FixedWindows | None:
    if shape.windows == "none":
        return None
    return (
        FixedWindows(shape.start)
        if shape.windows == "fixed"
        else WindowHead(shape.width, shape.start, shape.edges, shape.cut)
    )


# --- the same windows on a timm model --------------------------------------------------------------------------------


class WindowedAttention(nn.Module):
    """A timm attention module, its weights untouched, whose patches see each other within predicted windows."""

    def __init__(self, attn: Any, prefix: int, grid: Grid, start: Start, edges: float = 0.0, cut: float = 0.0) -> None:
        super().__init__()
        self.attn, self.prefix, self.grid = attn, prefix, grid
        self.windows = WindowHead(attn.qkv.in_features, start, edges, cut)

    def forward(
        self, tokens: Float[Tensor, "image token channel"], attn_mask: Tensor | None = None, **options: Any
    ) -> Float[Tensor, "image token channel"]:
        """What timm's module gives, with the windows added to its mask."""
        if tokens.shape[1] != self.prefix + self.grid[0] * self.grid[1]:
            raise Unsupported(
                f"{tokens.shape[1]} tokens came to windows made for {self.prefix} and a grid of {self.grid}; attach "
                "the window heads after the model has its image size."
            )
        mask = attention_bias(self.windows.mask(tokens[:, self.prefix :], self.grid), self.prefix, tokens)
        both = attn_mask if mask is None else mask if attn_mask is None else mask + attn_mask
        out: Tensor = self.attn(tokens, attn_mask=both, **options)
        return out


def attach(model: Any, start: Start = FULL, edges: float = 0.0, cut: float = 0.0) -> Any:
    """Gives every block of a plain timm ViT window heads, in place.

    With the default start the model answers as before, bitwise, in evaluation; while training, soft edges change its
    answers a little. The heads are drawn anew: call `torch.manual_seed` first for a run that can be repeated.

    Args:
        model: timm's `VisionTransformer`, with the image size that it is to have.
        start: Where windows begin, as in `Architecture`.
        edges: The temperature of edges in evaluation, as in `Shape`.
        cut: Where soft edges are cut, as in `Shape`.

    Returns:
        The model.

    Raises:
        Unsupported: The model is no plain timm ViT.
        UsageError: The start fits no head.

    Example:
        model = attach(timm.create_model("deit_tiny_patch16_224", pretrained=True))
    """
    from timm.models.vision_transformer import Attention as TimmAttention

    blocks = list(getattr(model, "blocks", ()))
    if not blocks or not all(isinstance(getattr(block, "attn", None), TimmAttention) for block in blocks):
        kinds = sorted({type(getattr(block, "attn", None)).__name__ for block in blocks}) or "no blocks"
        raise Unsupported(
            f"Window heads were to go onto {type(model).__name__}, whose blocks hold {kinds}; they fit timm's "
            "VisionTransformer (vit_*, deit_*) with its own Attention."
        )
    heads = blocks[0].attn.num_heads
    if len(start) not in (1, heads):
        raise UsageError(f"{len(start)} windows a layer were asked for; give 1 or {heads}, one a head.")
    grid = tuple(model.patch_embed.grid_size)
    weight = next(model.parameters())
    for block in blocks:
        windowed = WindowedAttention(block.attn, model.num_prefix_tokens, grid, start, edges, cut)
        block.attn = windowed.to(weight.device, weight.dtype).train(model.training)
    return model


# --- the windows of a whole model ------------------------------------------------------------------------------------


def window_heads(model: nn.Module) -> list[WindowHead | FixedWindows]:
    """Finds the modules that hold the windows of each layer.

    Args:
        model: Any module.

    Returns:
        The windows, first layer first; empty for a plain ViT.
    """
    return [module for module in model.modules() if isinstance(module, (WindowHead, FixedWindows))]


def set_temperature(model: nn.Module, temperature: float, *, hard: bool | None = None) -> None:
    """Sets how soft the edges of predicted windows are while training.

    Args:
        model: A model with windows.
        temperature: The sigmoid's unit, in patches, above 0.
        hard: Whether edges are hard as in evaluation, the soft ones giving the gradient only (straight through). None
            leaves that as it is.

    Raises:
        UsageError: The temperature is not above 0.
    """
    if not 0 < temperature < float("inf"):
        raise UsageError(f"A temperature of {temperature} has no meaning; it is above 0.")
    for head in window_heads(model):
        if isinstance(head, WindowHead):
            head.temperature.fill_(temperature)
            if hard is not None:
                head.hard = hard or None


def moved_windows(
    model: nn.Module, moves: Sequence[tuple[int, Sequence[float | int], int | None, int | None]]
) -> nn.Module:
    """A copy of a model, with the same weights, some of whose windows have other sides than it predicts.

    Args:
        model: A model with windows.
        moves: Layer; patches left, top, right, bottom of the query; head, None for all; patch, None for every query. A
            later move counts where two are of the same window.

    Returns:
        The copy, in evaluation mode.

    Raises:
        UsageError: A layer, head or patch is not there, or a window does not have four sides of 0 or more.

    Example:
        wider = moved_windows(model, [(3, (2, 2, 5, 2), None, 17)])     # layer 3, the window of patch 17
    """
    copy = clone_sharing(model)
    kinds = (WindowHead, FixedWindows)
    holders: list[Any] = [each for each in copy.modules() if isinstance(getattr(each, "windows", None), kinds)]
    checked = [_checked_move(move, holders) for move in moves]
    for layer in {move[0] for move in checked}:
        own = [move[1:] for move in checked if move[0] == layer]
        holders[layer].windows.change = _change_sides(own, _n_heads(holders[layer]))
    return copy


def _checked_move(move: Any, holders: Sequence[Any]) -> tuple[int, tuple[float, ...], int | None, int | None]:
    """A move of `moved_windows` whose layer, head and patch are there."""
    try:
        layer, sides, head, patch = move
        sides = tuple(map(float, sides))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{move!r} moves no window; give layer, four sides, head or None, patch or None.") from error
    if len(sides) != 4 or not all(side >= 0 for side in sides):
        raise UsageError(f"A window has four sides of 0 or more (left, top, right, bottom), not {sides}.")
    layer = number_below(len(holders), "layer", layer, "the model")
    owner, (rows, columns) = f"L{layer}", holders[layer].grid
    head = None if head is None else number_below(_n_heads(holders[layer]), "head", head, owner)
    patch = None if patch is None else number_below(rows * columns, "window", patch, owner)
    return layer, sides, head, patch


def _n_heads(holder: Any) -> int:
    n_heads: int = getattr(holder, "attn", holder).num_heads  # of timm's module, which a holder wraps
    return n_heads


def _change_sides(
    moves: Sequence[tuple[Sequence[float | int], int | None, int | None]], n_heads: int
) -> Callable[[Tensor], Tensor]:
    def change(sides: Sides) -> Tensor:  # one window for all heads becomes one a head, as a move may be of one head
        changed = sides.expand(-1, n_heads, -1, -1).clone()
        for new, head, patch in moves:
            heads = slice(None) if head is None else slice(head, head + 1)
            queries = slice(None) if patch is None else slice(patch, patch + 1)
            changed[:, heads, queries] = changed.new_tensor(list(new))
        return changed

    return change


@contextmanager
def record_sides(model: nn.Module) -> Iterator[list[Tensor]]:
    """Records, within, the sides that each layer predicts as the model runs, gradients and all.

    Args:
        model: A model with windows.

    Returns:
        A list that fills layer by layer, [image window patch side] in patches.

    Example:
        with record_sides(model) as sides:
            logits = model(images)
        sides[3]     # layer 3
    """
    sides: list[Tensor] = []
    heads = window_heads(model)
    for head in heads:
        head.record = sides
    try:
        yield sides
    finally:
        for head in heads:
            head.record = None
