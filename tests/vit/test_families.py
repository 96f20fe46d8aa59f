"""The contract suite: each family is held to each promise, and docs/support.md is written from what was measured."""

from pathlib import Path

import pytest
from numpy.testing import assert_allclose

from vitrail.vit.families import FAMILIES, Family, Row, run_contract, support_table

_SUPPORT = Path(__file__).resolve().parents[2] / "docs" / "support.md"

_BOUNDS = {
    "logits unchanged": 0,
    "rows sum to 1": 1e-6,
    "weights @ v": 2e-6,
    "prune = surgery": 1e-6,
    "run from the middle": 0,
    "heads stacked": 5e-6,
}
"""Largest relative differences, in float32, that the trial on 59 models saw or that batch size may change."""

_HEADER = """# Which models Vitrail opens

Written by `tests/vit/test_families.py`, which runs the contract suite (`vitrail.vit.families`) on tiny random models of
each family: its own code, cut in depth, width and image size. float32 on a CPU. A number is the worst difference
relative to the largest value: 0 is bitwise equal.

- **logits unchanged**: under the tap, against the untouched model at the same batch size.
- **rows sum to 1**: of every attention map. **weights @ v**: against the model's own attention output.
- **prune = surgery**: a pruned head against a copy whose output projection has the head's columns zeroed.
- **edits act**: pruning a head moves the logits in every layer.
- **run from the middle**: from every layer, without edits, against the plain pass.
- **heads stacked**: up to four heads pruned on one batch, against one at a time.
- **maps on the grid**: which layers have maps that join patches of the image.
- **nothing left behind**: no hook, mode, attribute or changed weight on the model, also after an exception.

"""

_rows: dict[str, Row] = {}


@pytest.fixture(scope="module", autouse=True)
def _write_support_page():
    yield
    if len(_rows) == len(FAMILIES) and all(row.ok for row in _rows.values()):
        _SUPPORT.write_text(_HEADER + support_table([_rows[family.name] for family in FAMILIES]))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family_keeps_every_promise_or_is_refused_with_a_reason(family: Family):
    row = run_contract(family)
    _rows[family.name] = row
    assert row.left == ()
    if family.refused:
        assert type(row.refusal).__name__ == family.refused, row.refusal
        assert len(str(row.refusal)) > 60
        return
    assert row.report is not None, row.refusal
    assert row.report.ok, row.report.text()
    for name, bound in _BOUNDS.items():
        finding = row.report.finding(name)
        if finding.holds is None:
            assert finding.word
            assert len(finding.sentence) > 20
        else:
            assert_allclose(finding.figure, 0, atol=bound, err_msg=f"{family.name}: {name}")


def test_family_names_are_unique():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
