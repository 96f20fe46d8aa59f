"""The contract suite: every promise of the tap, tried on a tiny random model of each family. Nothing is downloaded.

from vitrail.contract.tiny_models import FAMILIES, Family, run_contract, support_page
rows = [run_contract(family) for family in FAMILIES]
rows.append(run_contract(Family("mine", make_my_model, image_size=224)))
print(support_page(rows))
"""

import re
from dataclasses import dataclass

from vitrail.contract.check import PROMISES, Finding, Report, check_vit, differences, footprint
from vitrail.contract.outlook import Outlook, study_outlook
from vitrail.contract.tiny_models.registry import FAMILIES, Family
from vitrail.errors import VitrailError
from vitrail.models.open import open_vit
from vitrail.tap.anatomy import Anatomy

__all__ = ["FAMILIES", "Family", "Row", "run_contract", "support_page"]


@dataclass(frozen=True)
class Row:
    """The result of the suite on one family: a report, or the error with which the model was refused.

    Attributes:
        family: The family.
        report: The report, None where the model was refused.
        anatomy: The anatomy, None where the model was refused.
        refusal: The error with which the model was refused, None where it was opened.
        changes: What opening changed on the user's model: nothing, if all is well.
        outlook: What a study will hold, None where the model was refused.
    """

    family: Family
    report: Report | None
    anatomy: Anatomy | None
    refusal: VitrailError | None
    changes: tuple[str, ...] = ()
    outlook: Outlook | None = None

    @property
    def ok(self) -> bool:
        """Whether every promise holds and nothing was changed; or the model was refused as it should be."""
        if self.report is None:
            return type(self.refusal).__name__ == self.family.refused
        return self.family.refused is None and self.report.ok and not self.changes


def run_contract(family: Family, *, quick: bool = False) -> Row:
    """Opens a model of a family and tries every promise on it.

    Args:
        family: The family.
        quick: Passes that are made per layer are made for the first, middle and last layer only.

    Returns:
        The result; `row.ok` says whether the family keeps every promise.

    Example:
        >>> row = run_contract(Family("mine", make_my_model, image_size=224))
        >>> print(row.report.text())
    """
    model = family.model()
    before = footprint(model)
    try:
        vit = open_vit(model, image_size=family.image_size)
    except VitrailError as refusal:
        return Row(family, None, None, refusal, tuple(differences(before, footprint(model))))
    changes = tuple(differences(before, footprint(model)))
    return Row(family, check_vit(vit, quick=quick), vit.anatomy, None, changes, study_outlook(vit))


# --- the page --------------------------------------------------------------------------------------------------------

_HEADER = """# Which models Vitrail opens

Written by `scripts/write_support.py`, which runs the contract suite (`vitrail.contract.tiny_models`) on tiny random
models of each family: its own code, cut in depth, width and image size. float32 on a CPU. A number is the largest
difference relative to the largest value: 0 is bitwise equal.

- **logits unchanged**: under the tap, against the untouched model at the same batch size.
- **rows sum to 1**: of every attention map. **weights @ v**: against the model's own attention output.
- **prune = surgery**: a pruned head against an untapped copy whose output projection is given zeros in its place.
- **edits act**: in every layer a pruned head is gone from what the output projection is given.
- **run from the middle**: from every layer, without edits, against the plain pass.
- **heads batched**: up to four heads pruned on one batch, against one at a time.
- **maps on the grid**: which layers have maps that join patches of the image.
- **nothing left behind**: no hook, mode, attribute or changed weight on the model, also after an exception.
- **study**: how many of the measures that are for any model a study of all analyses holds, with masks of objects given;
  the note says what is left out and why. It is what `vitrail check` says before a study. That the study then holds just
  that, and that figures, report, look and page go through, is tried by `tests/end_to_end.py`.

"""

_SMALLEST_POWER = -6
"""float32 keeps 7 digits, so smaller differences than this are rounding."""

_STUDY = "study"
_COLUMNS = ("family", "layers", "prefix + grid", *PROMISES, _STUDY)

_NUMBERS_OF_CHANCE = re.compile(r" \(by .*?\)")
"""They differ from machine to machine, so the page goes without."""


def support_page(rows: list[Row]) -> str:
    """Formats results as a page of Markdown: family x promise, with reasons as footnotes.

    Differences are given as the power of ten that bounds them: the next digits differ from machine to machine.

    Args:
        rows: The results, one for each family.

    Returns:
        The page as Markdown.
    """
    notes: list[str] = []
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    lines += [_line(_refusal_cells(row, notes) if row.report is None else _cells(row, notes)) for row in rows]
    footnotes = [f"[^{number}]: {note}" for number, note in enumerate(notes, 1)]
    return _HEADER + "\n".join([*lines, "", *footnotes, ""])


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, notes: list[str]) -> list[str]:
    assert row.report is not None
    assert row.anatomy is not None
    blocks = row.anatomy.blocks
    kinds = "/".join(dict.fromkeys(call.kind for block in blocks for call in block.calls))
    findings = [row.report.finding(name) for name in PROMISES]
    cells = [
        row.family.name,
        f"{len(blocks)} {kinds}",
        _tokens(row.anatomy),
        *(_cell(item, notes) for item in findings),
    ]
    return [*cells, _study_cell(row.outlook, notes)]


def _tokens(anatomy: Anatomy) -> str:
    shapes = dict.fromkeys(
        f"{block.prefix - block.behind} + {block.grid[0]} x {block.grid[1]}{f' + {block.behind}' * (block.behind > 0)}"
        if block.grid
        else f"{block.tokens}, no grid"
        for block in anatomy.blocks
    )
    return ", ".join(shapes)


def _cell(finding: Finding, notes: list[str]) -> str:
    if finding.holds is None:
        return f"{finding.word}{_footnote(f'{finding.name}: {finding.sentence}.', notes)}"
    if not finding.holds:
        return f"**broken**{_footnote(f'{finding.name}: {finding.sentence}.', notes)}"
    return "yes" if finding.figure is None else _power_of_ten(finding.figure)


def _study_cell(outlook: Outlook | None, notes: list[str]) -> str:
    assert outlook is not None
    if not outlook.ok:
        reason = _NUMBERS_OF_CHANCE.sub("", outlook.refusal)
        return f"refused{_footnote(f'{_STUDY}: refused, as the model {reason}', notes)}"
    n_left_out = sum(map(len, outlook.left_out.values()))
    whole = f"{len(outlook.measures)} of {len(outlook.measures) + n_left_out}"
    if not n_left_out:
        return whole
    reasons = [f"{', '.join(f'`{name}`' for name in names)}: {why}" for why, names in outlook.left_out.items()]
    return whole + _footnote(f"{_STUDY}: left out: {'; '.join(reasons)}.", notes)


def _refusal_cells(row: Row, notes: list[str]) -> list[str]:
    refused = f"refused{_footnote(str(row.refusal), notes)}"
    return [row.family.name, *[refused] * (len(_COLUMNS) - 1)]


def _footnote(note: str, notes: list[str]) -> str:
    if note not in notes:
        notes.append(note)
    return f"[^{notes.index(note) + 1}]"


def _power_of_ten(figure: float) -> str:
    """0, or the power of ten that bounds it, from 1e-6 up."""
    if figure == 0:
        return "0"
    exponent = next((power for power in range(_SMALLEST_POWER, 0) if figure <= 10.0**power), None)
    return f"≤ 1e{exponent}" if exponent is not None else "> 0.1"
