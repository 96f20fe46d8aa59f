"""Builds the wheel and the source archive in a clean environment and uses the wheel as a stranger would.

    python scripts/test_wheel.py [--keep FOLDER]

The files of this working tree, committed or not, are copied and built there, so nothing that only this checkout holds
can get in. The wheel is installed where torch is not: there a study is opened, served, reported, drawn and compared.
The studies are made by the wheel too, where the models' libraries of this Python are visible. Needs a registry of
Python packages, and of npm packages for the page. Exits with 1 and a sentence at the first thing that does not hold.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PAGE = "app/static/index.html"
WITHOUT = ("torch", "torchvision", "timm", "transformers")
"""What a base installation must not bring: 5 GB, and nothing that reads a finished study needs it."""

PYTHONS = ("3.11", "3.12", "3.13")
IMAGES = 6
STUDIES = {
    "a": ["demo", "--no-serve", "--measures", "heads"],
    "b": ["study", "vitrail:photos", "vitrail:photos", "--weights", "random", "--no-figures"],
}
"""Two studies of the same images, for `compare`; the model that comes with Vitrail needs no network."""

NO_PLACE = frozenset(["web/node_modules", ".venv", ".build", ".git"])
MACHINE_PATH = re.compile(rb"/(?:home|root|Users)/[A-Za-z0-9_.-]+/|[A-Z]:\\\\?Users\\")
SERVE_S = 60


class Broken(Exception):
    """What does not hold, in a sentence."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="Leave the archives in this folder.")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory(prefix="vitrail-wheel-") as name:
        folder = Path(name)
        try:
            check(folder, keep)
        except Broken as broken:
            sys.exit(f"test_wheel: {broken}")


def check(folder: Path, keep: Path | None) -> None:
    """All steps, each with its seconds."""
    with step("source archive and wheel, built from it"):
        sdist, wheel = build(folder)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for archive in (sdist, wheel):
                shutil.copy(archive, keep)
    with step("what the archives hold"):
        check_contents(sdist, folder)
        check_contents(wheel, folder)
    with step("wheels of all dependencies for Python " + ", ".join(PYTHONS)):
        check_pythons(wheel)
    with step("two studies by the wheel, models' libraries visible"):
        maker = environment(folder / "with-models", wheel, borrow=True)
        studies = make_studies(maker, folder)
    with step("installation without torch"):
        reader = environment(folder / "base", wheel)
        check_without_torch(reader, folder)
    with step("its page"):
        check_page(reader, studies[0], folder)
    with step("its report, figures and comparison"):
        check_reading(reader, studies, folder)
    with step("the same with the lowest versions that are allowed"):
        oldest = environment(folder / "lowest", wheel, lowest=True)
        check_page(oldest, studies[0], folder)
        check_reading(oldest, studies, folder)


@contextmanager
def step(title: str) -> Iterator[None]:
    start = time.monotonic()
    print(f"{title} ...", end=" ", flush=True)
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """The output of a command, which must end with this status; nothing of this checkout is on its path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(each) for each in command], cwd=cwd, env=clean, capture_output=True, text=True)
    if done.returncode != status:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise Broken(f"{' '.join(map(str, command))} ended with {done.returncode}, not {status}:\n{tail}")
    return done.stdout


def program(python: Path, name: str) -> Path:
    return python.with_name(name + python.suffix)


def environment(folder: Path, wheel: Path | None = None, *, borrow: bool = False, lowest: bool = False) -> Path:
    """A new virtual environment, with the wheel.

    `borrow` takes all dependencies from this Python instead of pip, `lowest` each in the oldest version it may have.
    """
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = folder / scripts / ("python.exe" if os.name == "nt" else "python")
    if borrow:
        packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
        Path(packages, "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    if wheel is not None:
        extra = ["--no-deps"] if borrow else []
        if lowest:
            constraints = folder / "lowest.txt"
            constraints.write_text("\n".join(lowest_versions(wheel)), encoding="utf-8")
            extra = ["--constraint", constraints]
        run(python, "-m", "pip", "install", "--quiet", "--no-compile", *extra, wheel, cwd=folder)
    return python


def lowest_versions(wheel: Path) -> list[str]:
    """Every dependency of a base installation, as `NAME==VERSION` with the version after its `>=`."""
    metadata = next(data for name, data in contents(wheel) if name.endswith(".dist-info/METADATA")).decode()
    required = re.findall(r"^Requires-Dist: ([^;\n]+)(?:;(?! extra).*)?$", metadata, re.MULTILINE)
    unbounded = [each for each in required if ">=" not in each]
    if unbounded or not required:
        raise Broken(f"no lowest version is named of {', '.join(unbounded) or 'anything'}")
    return [each.strip().replace(">=", "==") for each in required]


def build(folder: Path) -> tuple[Path, Path]:
    """The source archive, and the wheel that `build` makes from it."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    source = folder / "source"
    for name in filter(None, listed):
        if (ROOT / name).is_file():  # one that was removed and not yet committed is listed too
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    python = environment(folder / "build")
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", "build", cwd=folder)
    run(python, "-m", "build", "--outdir", folder / "dist", source, cwd=folder)
    archives = sorted((folder / "dist").iterdir())
    if [each.suffix for each in archives] != [".whl", ".gz"]:
        raise Broken(f"`python -m build` made {[each.name for each in archives]}, not one wheel and one source archive")
    return archives[1], archives[0]


def check_contents(archive: Path, folder: Path) -> None:
    """The page and its scripts are in, and no file names a path of this machine."""
    files = dict(contents(archive))
    page = [name for name in files if name.endswith(PAGE)]
    if len(page) != 1:
        raise Broken(f"{archive.name} holds {len(page)} pages ({PAGE}), not one")
    assets = page[0].removesuffix("index.html")
    for target in re.findall(r'(?:src|href)="\.?/?([^":]+)"', files[page[0]].decode()):
        if assets + target not in files:
            raise Broken(f"{archive.name}: the page asks for {target}, which is not in")
    places = [folder.as_posix().encode(), ROOT.as_posix().encode()]
    for name, data in files.items():
        if any(f"/{place}/" in f"/{name}" for place in NO_PLACE):
            raise Broken(f"{archive.name} holds {name}, which belongs to a machine")
        match = MACHINE_PATH.search(data) if not name.endswith((".png", ".jpg", ".safetensors", ".npz")) else None
        named = match[0] if match else next((place for place in places if place in data), None)
        if named and not name.endswith(("tests/test_repository.py", "scripts/test_wheel.py")):
            raise Broken(f"{archive.name}: {name} names {named.decode(errors='replace')}, a path of a machine")


def contents(archive: Path) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist())
        return
    with tarfile.open(archive) as sdist:
        for member in sdist.getmembers():
            file = sdist.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read()


def check_pythons(wheel: Path) -> None:
    """Every dependency has a wheel for each Python that the package names: a stranger needs no compiler."""
    for version in PYTHONS:
        choice = ("--python-version", version, "--only-binary", ":all:", "--target", wheel.parent / "none")
        pip = (
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--no-warn-conflicts",
        )
        run(*pip, *choice, wheel, cwd=wheel.parent)


def make_studies(python: Path, folder: Path) -> list[Path]:
    """The demo, and another study of its photographs."""
    where = run(python, "-c", "import vitrail; print(vitrail.__file__)", cwd=folder)
    if not Path(where.strip()).is_relative_to(folder):
        raise Broken(f"the wheel was to be tried, and {where.strip()} was imported")
    for name, command in STUDIES.items():
        run(program(python, "vitrail"), *command, "--limit", str(IMAGES), "--out", folder / name, cwd=folder)
    return [folder / name for name in STUDIES]


def check_without_torch(python: Path, folder: Path) -> None:
    """Nothing of the models came along, and what needs a model says what to install."""
    installed = json.loads(run(python, "-m", "pip", "list", "--format", "json", cwd=folder))
    brought = {each["name"].lower() for each in installed} & set(WITHOUT)
    if brought:
        raise Broken(f"a base installation brought {', '.join(sorted(brought))}")
    doctor = json.loads(run(program(python, "vitrail"), "doctor", "--json", cwd=folder, status=1))
    if doctor["page"] != "built" or "vitrail[models]" not in doctor["missing"]:
        raise Broken(f"doctor says {doctor}")


def check_page(python: Path, study: Path, folder: Path) -> None:
    """`vitrail open` serves the page, what it asks for, and the study."""
    command = [program(python, "vitrail"), "open", study, "--port", "0", "--no-browser", "--no-live"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean["PYTHONUNBUFFERED"] = "1"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([str(each) for each in command], cwd=folder, env=clean, **pipes) as server:
        try:
            line = server.stdout.readline()
            address = re.search(r"http://\S+", line)
            if address is None:
                raise Broken(f"vitrail open printed {line!r} and no address")
            page = get(address[0]).decode()
            targets = re.findall(r'(?:src|href)="\.?/?([^":]+)"', page)
            if not any(target.endswith(".js") for target in targets):
                raise Broken("the page that is served has no script")
            for target in targets:
                get(address[0] + target)
            description = json.loads(get(address[0] + "api/study"))
            if description["sizes"]["image"] != IMAGES:
                raise Broken(f"/api/study says {description['sizes']}, and the study has {IMAGES} images")
        finally:
            server.terminate()


def get(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=SERVE_S) as answer:  # noqa: S310 - an address of this machine
            return answer.read()
    except OSError as failure:
        raise Broken(f"GET {address}: {failure}") from failure


def check_reading(python: Path, studies: list[Path], folder: Path) -> None:
    """A report, figures, and a comparison, of finished studies without torch."""
    vitrail = program(python, "vitrail")
    run(vitrail, "report", studies[0], "--out", folder / "report.html", cwd=folder)
    run(vitrail, "figures", studies[0], "--out", folder / "figures", cwd=folder)
    run(vitrail, "compare", *studies, "--out", folder / "compared.html", cwd=folder)
    for name in ("report.html", "compared.html"):
        if "<img" not in (folder / name).read_text(encoding="utf-8"):
            raise Broken(f"{name} has no figure")
    if not list((folder / "figures").glob("*.png")):
        raise Broken("`vitrail figures` drew nothing")


if __name__ == "__main__":
    main()
