"""The contract suite: each family is held to each promise, and docs/support.md says what was measured."""

import re
from pathlib import Path

import pytest
from numpy.testing import assert_allclose

from vitrail.contract.tiny_models import FAMILIES, Family, Row, run_contract, support_page

_SUPPORT = Path(__file__).resolve().parents[2] / "docs" / "support.md"

_BOUNDS = {
    "logits unchanged": 0,
    "rows sum to 1": 1e-6,
    "weights @ v": 2e-6,
    "prune = surgery": 1e-6,
    "run from the middle": 0,
    "heads batched": 5e-6,
}
"""Largest relative differences, in float32, that the trial on 59 models saw or that batch size may change."""

_rows: dict[str, Row] = {}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family_keeps_every_promise_or_is_refused_with_a_reason(family: Family):
    row = run_contract(family)
    _rows[family.name] = row
    assert row.changes == ()
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


def _without_figures(page: str) -> str:
    """Which differences are bitwise zero and which are rounding depends on the machine; bounds on them are above.

    Nor does the page have to be written anew for each measure that is added: reasons are compared, not the measures.
    """
    page = re.sub(r"(?<=\| )(0|≤ 1e-[56])(?= \|)", "#", page)
    return re.sub(r"(`\w+`, )*`\w+`: ", "", re.sub(r"\d+ of \d+(?=\[| \|)", "#", page))


def test_the_support_page_says_what_was_measured():
    if len(_rows) < len(FAMILIES):
        pytest.skip("compares the page with the runs of all families in this file; run the whole file")
    page = support_page([_rows[family.name] for family in FAMILIES])
    assert _without_figures(_SUPPORT.read_text()) == _without_figures(page), (
        "docs/support.md is old; run: python scripts/write_support.py"
    )
