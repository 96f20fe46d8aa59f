"""Hooks of the documentation's build: the reference of the command line, and links that leave the site's folder."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_LINK = re.compile(r"\[(?P<text>[^\]\[]*)\]\((?P<target>(?!https?:|#|mailto:)[^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the page of the command line, a page for each notebook, and the gallery, drawn from a study made here."""
    from mkdocs.structure.files import File

    page, pictures = gallery()
    files.append(File.generated(config, "gallery.md", content=page))
    for name, picture in pictures.items():
        files.append(File.generated(config, f"gallery/{name}", content=picture))
    files.append(File.generated(config, "reference/commands.md", content=command_reference()))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Refuses a link that leads out of the site: it would be dead once the site is somewhere else."""
    del config, files
    outside = re.findall(r'href="((?:\.\./)+(?:src|tests|scripts|examples|benchmarks|experiments)/[^"]*)"', html)
    if outside:
        raise ValueError(f"{page.file.src_path} links out of the site: {outside}")
    return html


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes links to files of the repository plain text, and links into `docs/` links of the site."""
    del files
    folder = Path(config["docs_dir"])
    own = (folder / page.file.src_path).parent
    for name in re.findall(r"^<!-- whole: (\S+) -->$", markdown, flags=re.MULTILINE):
        text = (ROOT / name).read_text(encoding="utf-8")
        text = text if name.endswith(".md") else f"```python\n{text}```"
        markdown = markdown.replace(f"<!-- whole: {name} -->", text)

    def replace(match: re.Match[str]) -> str:
        path, _, anchor = match["target"].partition("#")
        for base in (own, ROOT):
            file = (base / path).resolve()
            if not file.exists() or not file.is_relative_to(ROOT):
                continue
            if not file.is_relative_to(folder) or file.is_dir():
                return match["text"]
            up = "../" * (len(Path(page.file.src_path).parts) - 1)
            return f"[{match['text']}]({up}{file.relative_to(folder).as_posix()}{'#' + anchor if anchor else ''})"
        return match[0]

    return _LINK.sub(replace, markdown)


_ABOUT_GALLERY = """\
# Gallery

Every figure, of the model and the photographs that come with Vitrail, each with the line that draws it.
`vitrail figures STUDY` draws all figures of a study, `vitrail look MODEL IMAGE` all of one image; a figure is one of
matplotlib, so `.savefig("figure.pdf")` writes it for a paper.

```python
import vitrail
from vitrail.data.photographs import photographs

vit = vitrail.open_vit("vitrail:photos")
study = vitrail.run_study(vit, "photos", out="study", limit=26, measures="{measures}")
image = vitrail.look(vit, photographs()["{photograph}"], name="{photograph}")
```"""

_PHOTOGRAPH = "cat"


def gallery() -> tuple[str, dict[str, bytes]]:
    """Draws every figure of a small study and of one photograph, as the code on the page does.

    Returns:
        Markdown, and the pictures that it shows, by name.
    """
    import matplotlib.pyplot as plt

    import vitrail
    from vitrail.data.photographs import photographs
    from vitrail.figures.style import picture
    from vitrail.figures.whole import draw_all

    vit = vitrail.open_vit("vitrail:photos")
    left_out = {"base", "windows", "objects"}  # of a WinT; with masks
    names = [name for name in vitrail.analyses() if name not in left_out]
    study = vitrail.run_study(vit, "photos", out=ROOT / ".build" / "gallery", limit=26, measures=",".join(names))
    image = vitrail.look(vit, photographs()[_PHOTOGRAPH], name=_PHOTOGRAPH)
    pictures: dict[str, bytes] = {}
    sections: dict[str, list[str]] = {name: [] for name in names}
    for dataset, variable, one_image in ((study, "study", False), (image, "image", True)):
        for drawn in draw_all(dataset, one_image=one_image):
            name = f"{variable}-{drawn.stem}.png"
            pictures[name] = picture(drawn.figure, "png")
            plt.close(drawn.figure)
            option = ", one_image=True" if one_image else ""
            line = f'vitrail.draw_figure({variable}, "{drawn.stem}"{option})'
            sections.setdefault(drawn.analysis, []).append(
                f"```python\n{line}\n```\n\n![{drawn.stem.replace('_', ' ')}](gallery/{name})"
            )
    parts = [_ABOUT_GALLERY.format(measures=",".join(names), photograph=_PHOTOGRAPH)]
    for name, figures in sections.items():
        analysis = vitrail.analyses()[name]
        if figures:
            parts += [f"## {analysis.title} (`--measures {name}`)", analysis.question, *figures]
    return "\n\n".join(parts) + "\n", pictures


_ABOUT_COMMANDS = """\
Written from the commands themselves: what `vitrail COMMAND --help` prints.

| exit code | meaning |
|---|---|
| 0 | all went well |
| 1 | a model, image or study cannot be used, or a check or verification failed; the sentence is on the error stream |
| 2 | the command line itself has no meaning: an unknown option, measure or format |
| 130 | Ctrl-C; what was done is kept, and the same command goes on |

A traceback is a bug. For a machine, `vitrail check`, `study`, `report` and `doctor` take `--json`: one JSON object on
the standard output, and progress on the error stream. `study` and `report` take `--quiet`.
`vitrail --install-completion` makes the shell complete commands and options."""


def notebook_page(path: Path) -> str:
    """Writes the page of a notebook: its text and its code.

    Args:
        path: The notebook.

    Returns:
        Markdown that ends with a link to the notebook, which the site holds too.
    """
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*parts, f"Run it: [{path.name}]({path.name})."]) + "\n"


def command_reference() -> str:
    """Writes the page of the command line.

    Returns:
        Markdown: a heading and the help text of every command.
    """
    import typer
    from typer.testing import CliRunner

    from vitrail.cli import app

    parts = ["# Command line", _ABOUT_COMMANDS]
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        printed = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}).invoke(app, [name, "--help"])
        usage = printed.stdout.replace("Usage: root ", "Usage: vitrail ").strip()
        parts.append(f"## vitrail {name}\n\n```text\n{usage}\n```")
    return "\n\n".join(parts) + "\n"
