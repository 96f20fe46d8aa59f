"""The parts of a report as one HTML file.

Every string of a study (ids, class names, reasons) passes `html.escape` here and nowhere else. The page's own content
policy forbids scripts and every load but pictures inside the file, so that it opens offline and can tell nobody.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitrail.figures.style import picture
from vitrail.report.parts import Drawing, Part, Photographs, Section, Table, Text

__all__ = ["page"]

LARGEST_SVG = 400_000
"""Bytes from which a figure is put in as PNG: dots and cells by the thousand are dear as outlines."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root {
  color-scheme: light dark;
  --paper: light-dark(#f7f6f2, #121417); --card: light-dark(#ffffff, #191c21); --ink: light-dark(#1d2127, #e7e5df);
  --soft: light-dark(#5a6170, #9ea5b1); --line: light-dark(#e2dfd6, #2d323a); --mark: light-dark(#c8470a, #ff8c42);
  --cool: light-dark(#0a628a, #6fc1e6);
  font: 400 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
li { margin: .3rem 0; }
a { color: var(--cool); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .8rem 0; }
.lead { color: var(--soft); margin: 0; }
.reading { color: var(--soft); font-size: .85rem; max-width: 52rem; margin: .4rem 0 0; }
.findings li::marker { color: var(--mark); }
figure { margin: 1.2rem 0; }
.sheet { background: #fff; border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; overflow-x: auto; }
.sheet img { display: block; width: 100%; max-width: var(--most); height: auto; margin: 0 auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: right; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
th.words, td.words { text-align: left; }
table.prose td.words,
table.facts td.words + td.words { white-space: normal; min-width: 7.5rem; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--cool); margin: 1rem 0 .4rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem;
  overflow-x: auto; font-size: .82rem; }
.photographs { display: flex; flex-wrap: wrap; gap: .8rem; }
.photographs div { width: 7.2rem; font-size: .78rem; line-height: 1.3; color: var(--soft); overflow-wrap: anywhere; }
.photographs img { display: block; width: 7.2rem; height: auto; border-radius: .3rem; margin-bottom: .2rem; }
@media (max-width: 40rem) {
  main { padding: 1rem .8rem 3rem; }
  .sheet img { width: max(100%, var(--least)); max-width: none; }
}
@media print {
  :root { color-scheme: light; font-size: 10pt; }
  body { background: #fff; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  figure, tr, .photographs div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .sheet { border: 0; padding: 0; overflow: visible; }
  .scroll { overflow: visible; }
}
"""


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole file; sections in their order, with a list of them at the top."""
    links = "".join(f'<li><a href="#{escape(each.key)}">{escape(each.title)}</a></li>' for each in sections)
    body = "\n".join(line for section in sections for line in _section(section))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n{body}\n</main>\n</body>\n</html>\n'
    )


def _section(section: Section) -> Iterator[str]:
    yield f'<section id="{escape(section.key)}">\n<h2>{escape(section.title)}</h2>'
    if section.findings:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in section.findings)
        yield f'<ul class="findings">{items}</ul>'
    for part in section.parts:
        yield _part(part)
    yield "</section>"


def _part(part: Part) -> str:
    if isinstance(part, Text):
        return f"<pre>{escape(part.text)}</pre>" if part.code else f"<p>{escape(part.text)}</p>"
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Photographs):
        return _photographs(part)
    return _drawing(part)


def _table(table: Table) -> str:
    kinds = ["words" if column in table.words else "" for column in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{_class(kind)}>{escape(name)}</th>' for name, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(f"<td{_class(kind)}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in table.rows
    )
    shape = "facts" if len(kinds) == 2 else "prose" if all(kinds) else ""
    head = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
    inner = (
        f'<div class="scroll"><table{_class(shape)}>{head}<tbody>{rows}</tbody></table></div>{_reading(table.reading)}'
    )
    if table.folded:
        return f"<details><summary>{escape(table.caption)}</summary>{inner}</details>"
    return (f"<h3>{escape(table.caption)}</h3>" if table.caption else "") + inner


def _photographs(shown: Photographs) -> str:
    pairs = zip(shown.pictures, shown.lines, strict=True)
    items = "".join(f'<div><img alt="" src="{_png(pixels)}">{escape(line)}</div>' for pixels, line in pairs)
    return f'<h3>{escape(shown.caption)}</h3><div class="photographs">{items}</div>{_reading(shown.reading)}'


def _drawing(drawing: Drawing) -> str:
    """The figure without its words, which can then be read on a phone, be selected and be searched."""
    figure = drawing.figure
    title, told = (" ".join(text.split()) for text in (figure.get_suptitle(), figure.get_supxlabel()))
    source = _source(figure)
    width = figure.get_figwidth()
    return (
        f"<figure><h3>{escape(title)}</h3>"
        f'<div class="sheet" style="--most: {width * 116:.0f}px; --least: {width * 62:.0f}px">'
        f'<img alt="{escape(title)}" src="{source}"></div>'
        f"<figcaption>{_reading(' '.join(filter(None, (drawing.reading, told))))}</figcaption></figure>"
    )


def _source(figure: Any) -> str:
    svg = picture(figure, "svg", bare=True)
    if len(svg) <= LARGEST_SVG:
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return _encoded(Image.open(io.BytesIO(picture(figure, "png", bare=True))).convert("RGB").quantize(256))


def _png(pixels: UInt8[np.ndarray, "row column channel"]) -> str:
    return _encoded(Image.fromarray(pixels).quantize(128))


def _encoded(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _reading(text: str) -> str:
    return f'<p class="reading">{escape(text)}</p>' if text else ""


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
