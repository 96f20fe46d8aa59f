"""Writes docs/measures.md from the declarations of all analyses, so that the page and the store say the same."""

from pathlib import Path

from vitrail.analysis import Analysis, analyses
from vitrail.measure import Measure

PAGE = Path(__file__).parents[1] / "docs" / "measures.md"

HEAD = """# Measures

Every quantity that a study holds, as its analysis declares it (this page is written from there by
`scripts/write_measures.py`). The store writes title, unit, reading and source beside each array:
`vitrail.open_study(DIR)[NAME].attrs`. Indices are zero-based; heads are printed L3H7. How each number is computed, step
by step, stands in [definitions](reference/definitions.md).
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_analysis(analysis) for analysis in analyses().values())


def _analysis(analysis: Analysis) -> str:
    lines = [f"\n## {analysis.title} (`{analysis.name}`)\n\n{analysis.question}\n"]
    options = [option for option in analysis.options if not option.hidden]
    if options:
        lines.append("\n| option | values (default first) | |\n|---|---|---|\n")
        lines += [f"| `{each.name}` | {', '.join(each.choices)} | {each.help} |\n" for each in options]
    lines += [_entry(measure) for measure in analysis.measures]
    if analysis.image_measures:
        lines.append(f"\n## {analysis.title}: of one image\n\nIn `vitrail.look(vit, image)`, not in a study.\n")
        lines += [_entry(measure) for measure in analysis.image_measures]
    return "".join(lines)


def _entry(measure: Measure) -> str:
    lines = [f"[{' '.join(measure.dims)}], {measure.unit}, {measure.dtype}"]
    lines += [f"Low: {measure.low}. High: {measure.high}."] if measure.low else []
    lines += [f"Source: {measure.source}."]
    lines += [f"Needs: {'; '.join(_needs(measure))}."] if measure.needs else []
    lines += [f"It cannot tell: {measure.limits}"]
    return f"\n### `{measure.name}`: {measure.title}\n\n" + "  \n".join(lines) + "\n"


def _needs(measure: Measure) -> list[str]:
    described = {need.name: need.description for analysis in analyses().values() for need in analysis.needs}
    return [described[need] for need in measure.needs]


if __name__ == "__main__":
    PAGE.write_text(page())
