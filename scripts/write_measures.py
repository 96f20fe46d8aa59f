"""Writes docs/measures.md from the declarations in `vitrail.measure`, so that the page and the store say the same."""

from pathlib import Path

from vitrail.measure import MEASURES, Measure

PAGE = Path(__file__).parents[1] / "docs" / "measures.md"

HEAD = """# Measures

Every quantity that a study holds, as declared in `vitrail.measure` (this page is written from there by
`scripts/write_measures.py`). The store writes title, unit, reading and source beside each array:
`vitrail.open_study(DIR)[NAME].attrs`. Indices are zero-based; heads are printed L3H7.
"""


def page() -> str:
    """The whole page."""
    rooms = dict.fromkeys(measure.room for measure in MEASURES.values())
    return HEAD + "".join(_room(room) for room in rooms)


def _room(room: str) -> str:
    measures = [measure for measure in MEASURES.values() if measure.room == room]
    return f"\n## {room.capitalize()}\n" + "".join(_entry(measure) for measure in measures)


def _entry(measure: Measure) -> str:
    lines = [f"[{' '.join(measure.dims)}], {measure.unit}, {measure.dtype}"]
    lines += [f"Low: {measure.low}. High: {measure.high}."] if measure.low else []
    lines += [f"Source: {measure.source}."]
    lines += [f"Needs: {', '.join(sorted(measure.needs)).replace('_', ' ')}."] if measure.needs else []
    lines += [f"It cannot tell: {measure.limits}"]
    return f"\n### `{measure.name}`: {measure.title}\n\n" + "  \n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
