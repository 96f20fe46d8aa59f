"""What the project says of itself is true: public names, documentation, imports, the README's code."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import vitrail
from vitrail.analysis import analyses, measures

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(code: str, folder: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_every_public_name_can_be_had_and_is_documented() -> None:
    for name in vitrail.__all__:
        assert getattr(vitrail, name).__doc__, name
    assert set(vitrail.__all__) <= set(dir(vitrail))


def test_the_page_of_measures_is_what_the_declarations_say() -> None:
    assert (ROOT / "docs" / "measures.md").read_text() == script("write_measures").page(), (
        "docs/measures.md is old; run: python scripts/write_measures.py"
    )


def test_every_measure_has_an_analysis_a_source_and_a_limit() -> None:
    for measure in measures().values():
        assert measure in analyses()[measure.analysis].measures, measure.name
        assert measure.source, measure.name
        assert measure.limits, measure.name
        assert measure.unit, measure.name


@pytest.mark.parametrize(
    "module",
    [
        "vitrail",
        "vitrail.cli",
        "vitrail.study.store",
        "vitrail.figures.heads",
        "vitrail.app.server",
        "vitrail.data",
        "vitrail.report",
    ],
)
def test_what_reads_a_study_never_loads_torch(module: str, tmp_path: Path) -> None:
    loaded = run(f"import {module}, sys; print(*(name for name in sys.modules if name in ('torch', 'timm')))", tmp_path)
    assert loaded.split() == []


def test_no_module_imports_what_one_system_alone_has() -> None:
    """Windows lacks these; a module that tries to import them must go on without."""
    systems = {"fcntl", "grp", "posix", "pwd", "resource", "termios", "msvcrt", "winreg"}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # those inside `try` or a function may
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not systems & {name.partition(".")[0] for name in names}, path


def test_importing_every_module_prints_nothing(tmp_path: Path) -> None:
    names = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in (ROOT / "src").rglob("*.py")]
    code = "; ".join(f"import {name.removesuffix('.__init__')}" for name in sorted(names))
    assert run(code, tmp_path) == ""


def test_the_code_of_the_readme_runs_and_makes_its_picture(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    ast.parse(code[1])
    run(code[1].replace('out="study"', 'out="study", limit=32'), tmp_path)
    assert (tmp_path / "overview.png").stat().st_size > 20_000


def test_every_file_and_command_that_the_documentation_names_is_there() -> None:
    from typer.main import get_command

    from vitrail.cli import app

    commands = set(get_command(app).commands)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for command in re.findall(r"^    vitrail (\w+)", text, re.MULTILINE):
            assert command in commands, f"{page.name} names the command {command}"


def test_what_a_base_installation_brings_may_be_used_freely(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("licences").main([]) == 0, capsys.readouterr().out


def test_no_tracked_file_names_a_registry_or_a_path_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    forbidden = re.compile(r'"resolved":|index-url|/(home|root|Users)/\w+/')
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".ts", ".svelte", ".cfg") and path != Path(__file__):
            assert not forbidden.search(path.read_text()), name


def test_modules_of_tests_have_names_of_their_own() -> None:
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    names = [path.stem for path in paths]
    assert {str(path) for path in paths if names.count(path.stem) > 1} == set(), "pytest imports them by name alone"
