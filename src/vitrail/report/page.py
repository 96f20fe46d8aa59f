"""The parts of a report as one HTML file.

Every string of a study (ids, class names, reasons) passes `html.escape` here and nowhere else. The page's own content
policy forbids scripts and every load but pictures inside the file, so that it opens offline and can tell nobody.
"""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitrail.figures.style import picture
from vitrail.report.parts import Drawing, Part, Photographs, Picture, Points, Section, Table, Text
from vitrail.sentence import Sentence

__all__ = ["page"]

LARGEST_SVG = 400_000
"""Bytes from which a figure is put in as PNG: dots and cells by the thousand are dear as outlines."""

Thumbnail = Callable[[int], UInt8[np.ndarray, "row column channel"] | None]
"""The small picture of an image of the study."""

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
main { padding: 1.5rem 0 4rem; min-width: 0; }
.frame { display: grid; grid-template-columns: 13.5rem minmax(0, 66rem); gap: 0 2.5rem; max-width: 84rem;
  margin: 0 auto; padding: 0 1.25rem; }
.frame > nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto; padding: 2rem 0; }
.frame > nav b { display: block; color: var(--soft); font-size: .85rem; font-weight: 600; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
li { margin: .3rem 0; }
a { color: var(--cool); }
nav ul { list-style: none; padding: 0; margin: .8rem 0; }
nav a { text-decoration: none; display: block; padding: .15rem 0; }
nav a:hover { text-decoration: underline; }
.lead { color: var(--soft); margin: 0; }
.reading { color: var(--soft); font-size: .85rem; max-width: 52rem; margin: .4rem 0 0; }
.findings { list-style: none; padding: 0; display: grid; gap: .7rem; margin: .8rem 0 1.4rem; }
.findings > li { margin: 0; padding-left: .8rem; border-left: 3px solid var(--line); }
.findings > li:first-child { border-color: var(--mark); font-size: 1.08rem; }
.pictured { margin: .35rem 0 0; font-size: .75rem; color: var(--soft); }
.pictured::first-letter { text-transform: uppercase; }
.small { display: flex; flex-wrap: wrap; gap: .35rem; margin-top: .35rem; font-size: .75rem; color: var(--soft); }
.small span { width: 4.2rem; line-height: 1.25; overflow-wrap: anywhere; }
.small img, td img { display: block; width: 4.2rem; height: 4.2rem; object-fit: cover; border-radius: .25rem; }
td img { width: 2.4rem; height: 2.4rem; }
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
table.facts td.words:first-child { white-space: normal; max-width: 24rem; overflow-wrap: break-word; }
summary { cursor: pointer; color: var(--cool); margin: 1rem 0 .4rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem;
  overflow-x: auto; font-size: .82rem; }
.photographs { display: flex; flex-wrap: wrap; gap: .8rem; }
.photographs div { width: 7.2rem; font-size: .78rem; line-height: 1.3; color: var(--soft); overflow-wrap: anywhere; }
.photographs img { display: block; width: 7.2rem; height: auto; border-radius: .3rem; margin-bottom: .2rem; }
.photographs div:only-child, .photographs div:only-child img { width: 16rem; }
@media (max-width: 64rem) {
  .frame { display: block; }
  .frame > nav { position: static; padding: .8rem 0 0; }
  nav ul { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; }
}
@media (max-width: 40rem) {
  .frame { padding: 0 .8rem; }
  main { padding: 1rem 0 3rem; }
  .sheet img { width: max(100%, var(--least)); max-width: none; }
}
@media print {
  :root { color-scheme: light; font-size: 10pt; }
  body { background: #fff; }
  .frame { display: block; max-width: none; padding: 0; }
  nav { display: none; }
  figure, tr, .photographs div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .sheet { border: 0; padding: 0; overflow: visible; }
  .scroll { overflow: visible; }
}
"""


def page(title: str, lead: str, sections: Sequence[Section], thumbnail: Thumbnail | None = None) -> str:
    """The whole file; sections in their order, with a list of them at the side.

    Args:
        title: Of the report.
        lead: The line under the title.
        sections: Of the report.
        thumbnail: The small picture of an image that sentences name; None shows none.

    Returns:
        HTML, with everything it shows inside.
    """
    links = "".join(f'<li><a href="#{escape(each.key)}">{escape(each.title)}</a></li>' for each in sections)
    body = "\n".join(line for section in sections for line in _section(section, thumbnail))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<div class="frame">\n'
        f'<nav aria-label="Sections"><b>Vitrail</b><ul>{links}</ul></nav>\n<main>\n'
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n</main>\n</div>\n</body>\n</html>\n'
    )


def _section(section: Section, thumbnail: Thumbnail | None) -> Iterator[str]:
    yield f'<section id="{escape(section.key)}">\n<h2>{escape(section.title)}</h2>'
    if section.findings:
        yield _sentences(section.findings, thumbnail)
    for part in section.all_parts():
        yield _part(part, thumbnail)
    yield "</section>"


def _sentences(sentences: Sequence[str], thumbnail: Thumbnail | None) -> str:
    """Each with the photographs that it names."""
    items = "".join(f"<li>{escape(each)}{_named_photographs(each, thumbnail)}</li>" for each in sentences)
    return f'<ul class="findings">{items}</ul>'


def _named_photographs(sentence: str, thumbnail: Thumbnail | None) -> str:
    if thumbnail is None or not isinstance(sentence, Sentence):
        return ""
    pairs = [(thumbnail(image), words) for image, words in sentence.images]
    present = [(pixels, words) for pixels, words in pairs if pixels is not None]
    pictures = "".join(f'<span><img alt="" src="{_png(pixels)}">{escape(words)}</span>' for pixels, words in present)
    caption = f'<p class="pictured">{escape(sentence.caption)}:</p>' if sentence.caption else ""
    return f'{caption}<div class="small">{pictures}</div>' if pictures else ""


def _part(part: Part, thumbnail: Thumbnail | None) -> str:
    if isinstance(part, Points):
        return f"<h3>{escape(part.caption)}</h3>{_sentences(part.sentences, thumbnail)}"
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
        + "".join(f"<td{_class(kind)}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
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


def _cell(cell: str | Picture) -> str:
    if isinstance(cell, str):
        return escape(cell)
    return f'<img alt="{escape(cell.words)}" title="{escape(cell.words)}" src="{_png(cell.pixels)}">'


def _photographs(photographs: Photographs) -> str:
    pairs = zip(photographs.pictures, photographs.lines, strict=True)
    items = "".join(f'<div><img alt="" src="{_png(pixels)}">{escape(line)}</div>' for pixels, line in pairs)
    caption = f"<h3>{escape(photographs.caption)}</h3>" if photographs.caption else ""
    return f'{caption}<div class="photographs">{items}</div>{_reading(photographs.reading)}'


def _drawing(drawing: Drawing) -> str:
    """The figure without its words, which can then be read on a phone, be selected and be searched."""
    figure = drawing.figure
    title, explanation = (" ".join(text.split()) for text in (figure.get_suptitle(), figure.get_supxlabel()))
    source = _source(figure)
    width = figure.get_figwidth()
    return (
        f"<figure><h3>{escape(title)}</h3>"
        f'<div class="sheet" style="--most: {width * 116:.0f}px; --least: {width * 62:.0f}px">'
        f'<img alt="{escape(title)}" src="{source}"></div>'
        f"<figcaption>{_reading(' '.join(filter(None, (drawing.reading, explanation))))}</figcaption></figure>"
    )


def _source(figure: Any) -> str:
    svg = picture(figure, "svg", bare=True)
    if len(svg) <= LARGEST_SVG:
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return _as_base64(Image.open(io.BytesIO(picture(figure, "png", bare=True))).convert("RGB").quantize(256))


def _png(pixels: UInt8[np.ndarray, "row column channel"]) -> str:
    return _as_base64(Image.fromarray(pixels).quantize(128))


def _as_base64(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _reading(text: str) -> str:
    return f'<p class="reading">{escape(text)}</p>' if text else ""


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
