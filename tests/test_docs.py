"""Every code block of the guides runs, page by page, in the order in which a reader meets them."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitrail.cli import app

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted([DOCS / "start.md", *DOCS.glob("how-to/*.md")])
BLOCK = re.compile(r"^```(?P<language>python|bash)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(match["language"], match["code"]) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_guide_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "guide"}
    for language, code in blocks(page):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, f"{page.name}: {code.splitlines()[0]}", "exec"), names)
        else:
            for line in code.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "vitrail"
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


def test_the_guides_have_code_to_run() -> None:
    assert sum(len(blocks(page)) for page in PAGES) > 10
