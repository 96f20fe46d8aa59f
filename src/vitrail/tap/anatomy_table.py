"""An anatomy as rows of text, a row for each run of equal blocks: what `vitrail check` prints and a notebook shows."""

from itertools import groupby

from vitrail.markup import html_table
from vitrail.tap.anatomy import Anatomy, Block, layer_ranges

__all__ = ["ANATOMY_COLUMNS", "anatomy_html", "anatomy_notes", "anatomy_rows"]

ANATOMY_COLUMNS = ("layers", "kind", "heads", "tokens", "attention", "module")


def anatomy_rows(anatomy: Anatomy) -> list[tuple[str, ...]]:
    """The blocks of a model, equal ones in a run as one row.

    Args:
        anatomy: Of any model.

    Returns:
        Rows with the cells of `ANATOMY_COLUMNS`.
    """
    rows: list[tuple[str, ...]] = []
    for _, run in groupby(enumerate(anatomy.blocks), lambda item: _alike(item[1])):
        members = list(run)
        block = members[0][1]
        layers = layer_ranges([layer for layer, _ in members])
        rows.append((layers, *_alike(block), block.path if len(members) == 1 else f"{block.path} ..."))
    return rows


def anatomy_html(anatomy: Anatomy) -> str:
    """The rows as a table for notebooks.

    Args:
        anatomy: Of any model.

    Returns:
        HTML.
    """
    return html_table("", anatomy_rows(anatomy), ANATOMY_COLUMNS, " ".join(anatomy_notes(anatomy)))


def anatomy_notes(anatomy: Anatomy) -> list[str]:
    """What stands under the rows: attention outside the blocks, and what was uncertain.

    Args:
        anatomy: Of any model.

    Returns:
        Lines of text, none where there is nothing to say.
    """
    pools = [f"outside the blocks: attention in {path or 'the model'}" for path in anatomy.pools]
    return [*pools, *(f"note: {note}" for note in anatomy.notes)]


def _alike(block: Block) -> tuple[str, str, str, str]:
    rows, columns = block.grid or (0, 0)
    behind = f" + {block.behind}" if block.behind else ""
    on_grid = f"{block.prefix - block.behind} + {rows}x{columns}{behind}"
    tokens = on_grid if block.grid else f"{block.tokens}, no grid"
    if not block.calls:
        return block.kind, "-", tokens, "not observed"
    call = block.calls[0]
    several = f" in {len(block.attentions)} attentions" if len(block.attentions) > 1 else ""
    windows = f" ({call.windows})" if call.windows > 1 else ""
    kinds = "/".join(dict.fromkeys(item.kind for item in block.calls))
    return f"{kinds}{windows}", f"{block.heads}{several}", tokens, "fused" if call.fused else "by hand"
