"""Tables in HTML, for what a notebook shows of an object. Every string is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["html_table"]

CELL = "text-align:left;vertical-align:top;padding:.15rem 1rem .15rem 0"


def html_table(title: str, rows: Iterable[Sequence[str]], columns: Sequence[str] = (), note: str = "") -> str:
    """A table with a title, as a notebook shows it.

    Args:
        title: Stands above it.
        rows: Cells of plain text.
        columns: Heads of the columns; none where the first cell of each row says what it is.
        note: A line under it.

    Returns:
        HTML without scripts and without anything that is loaded.
    """
    body = "".join(f"<tr>{''.join(_cell('td', cell) for cell in row)}</tr>" for row in rows)
    head = f"<thead><tr>{''.join(_cell('th', name) for name in columns)}</tr></thead>" if columns else ""
    end = f"<div>{escape(note)}</div>" if note else ""
    heading = f"<b>{escape(title)}</b>" if title else ""
    return f"<div>{heading}<table>{head}<tbody>{body}</tbody></table>{end}</div>"


def _cell(tag: str, text: str) -> str:
    return f'<{tag} style="{CELL}">{escape(text)}</{tag}>'
