"""The contract suite: every promise of the tap, tried on a tiny random model of each family. Nothing is downloaded.

from vitrail.vit.families import FAMILIES, Family, run_contract, support_table
rows = [run_contract(family) for family in FAMILIES]
rows.append(run_contract(Family("mine", make_my_model, image_size=224)))
print(support_table(rows))
"""

from dataclasses import dataclass

from vitrail.errors import VitrailError
from vitrail.vit.anatomy import Anatomy
from vitrail.vit.check import PROMISES, Finding, Report, check_vit, differences, footprint
from vitrail.vit.families.registry import FAMILIES, Family
from vitrail.vit.open import open_vit

__all__ = ["FAMILIES", "Family", "Row", "run_contract", "support_table"]


@dataclass(frozen=True)
class Row:
    """What the suite found on one family: a report, or the error with which the model was refused.

    left: what opening changed on the user's model (nothing, if all is well); what checking did, the report says.
    """

    family: Family
    report: Report | None
    anatomy: Anatomy | None
    refusal: VitrailError | None
    left: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Every promise holds and nothing was left; or the model was refused as it should be."""
        if self.report is None:
            return type(self.refusal).__name__ == self.family.refused
        return self.family.refused is None and self.report.ok and not self.left


def run_contract(family: Family, *, quick: bool = False) -> Row:
    """Opens a model of the family and tries every promise on it. `quick`: on its first, middle and last layer."""
    model = family.model()
    before = footprint(model)
    try:
        vit = open_vit(model, image_size=family.image_size)
    except VitrailError as refusal:
        return Row(family, None, None, refusal, tuple(differences(before, footprint(model))))
    left = tuple(differences(before, footprint(model)))
    return Row(family, check_vit(vit, quick=quick), vit.anatomy, None, left)


# --- the table -------------------------------------------------------------------------------------------------------

_COLUMNS = ("family", "layers", "prefix + grid", *PROMISES)


def support_table(rows: list[Row]) -> str:
    """Family x what works, as Markdown: the worst relative difference, or the reason in a word with a footnote.

    Differences are given as the power of ten that bounds them, so that the table is the same on other machines.
    """
    notes: list[str] = []
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    lines += [_line(_refused_cells(row, notes) if row.report is None else _cells(row, notes)) for row in rows]
    footnotes = [f"[^{number}]: {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *footnotes, ""])


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, notes: list[str]) -> list[str]:
    assert row.report is not None
    assert row.anatomy is not None
    blocks = row.anatomy.blocks
    kinds = "/".join(dict.fromkeys(call.kind for block in blocks for call in block.calls))
    findings = [row.report.finding(name) for name in PROMISES]
    return [row.family.name, f"{len(blocks)} {kinds}", _tokens(row.anatomy), *(_cell(item, notes) for item in findings)]


def _tokens(anatomy: Anatomy) -> str:
    shapes = dict.fromkeys(
        f"{block.prefix} + {block.grid[0]} x {block.grid[1]}" if block.grid else f"{block.tokens}, no grid"
        for block in anatomy.blocks
    )
    return ", ".join(shapes)


def _cell(finding: Finding, notes: list[str]) -> str:
    if finding.holds is None:
        return f"{finding.word}{_footnote(f'{finding.name}: {finding.sentence}.', notes)}"
    if not finding.holds:
        return f"**broken**{_footnote(f'{finding.name}: {finding.sentence}.', notes)}"
    return "yes" if finding.figure is None else _bounded(finding.figure)


def _refused_cells(row: Row, notes: list[str]) -> list[str]:
    refused = f"refused{_footnote(str(row.refusal), notes)}"
    return [row.family.name, *[refused] * (len(_COLUMNS) - 1)]


def _footnote(note: str, notes: list[str]) -> str:
    if note not in notes:
        notes.append(note)
    return f"[^{notes.index(note) + 1}]"


def _bounded(figure: float) -> str:
    """0, or the power of ten that bounds it, from 1e-6 up."""
    if figure == 0:
        return "0"
    exponent = next((power for power in range(-6, 0) if figure <= 10.0**power), None)
    return f"≤ 1e{exponent}" if exponent is not None else "> 0.1"
