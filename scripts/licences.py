"""Lists the licence of every package that Vitrail needs, as it is installed here.

    python scripts/licences.py [EXTRA ...]          default: the base installation; "all" for everything

Exits with 1 if a package is not installed, names no licence, or one that a user of Vitrail may not expect.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|HPND|Historical Permission|Unlicense|Zlib|CC0|"
    r"MIT-CMU|MPL|Mozilla|LGPL|Unicode)\b|public domain",
    re.IGNORECASE,
)
"""MPL and LGPL bind who changes the library, not who uses it."""


READ = {
    "opentsne": "its LICENSE file is the BSD licence of three clauses",
    "cuda-toolkit": "comes with torch for Linux; NVIDIA lets it be used and passed on",
    "nvidia-": "comes with torch for Linux; NVIDIA lets it be used and passed on",
}
"""Packages, or beginnings of their names, whose licence was read by a person, and what it says."""

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def own_requirements(extras: frozenset[str]) -> list[str]:
    """What `pyproject.toml` names: the installation here may be of an earlier state."""
    return [*PROJECT["dependencies"], *(each for extra in extras for each in PROJECT["optional-dependencies"][extra])]


def requirements(name: str, extras: frozenset[str], visited: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """Names of all packages that a package needs here, its own among them."""
    if (name, extras) in visited:
        return
    visited.add((name, extras))
    yield name
    try:
        needed = own_requirements(extras) if name == PROJECT["name"] else distribution(name).requires or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, needed):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            yield from requirements(
                re.sub(r"[-_.]+", "-", requirement.name).lower(), frozenset(requirement.extras), visited
            )


def licence(package: Distribution) -> str:
    """What a package says of its licence: the expression, else its classifiers, else the first line of the text."""
    about = package.metadata
    expression = about.get("License-Expression")
    if expression:
        return expression
    classified = [each.rpartition(" :: ")[2] for each in about.get_all("Classifier", []) if each.startswith("License")]
    lines = [line.strip() for line in (about.get("License") or "").splitlines() if line.strip()]
    return ", ".join(classified) or (lines[0] if lines else "")


def main(extras: list[str]) -> int:
    """Prints one line a package, and says whether all are permissive."""
    names = sorted(set(requirements("vitrail", frozenset(extras), set())))
    problems = []
    for name in names:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            problems.append(f"{name} is not installed, so its licence is not known")
            continue
        text = licence(package)
        text = next(
            (f"{text or 'none'} ({why})" for package_name, why in READ.items() if name.startswith(package_name)), text
        )
        print(f"{name:<28} {package.version:<16} {text}")
        if not PERMISSIVE.search(text) and not name.startswith(tuple(READ)):
            problems.append(f"{name} names {text or 'no licence'}; read it, and if it may be used, say so in READ")
    print(*problems, sep="\n", end="\n" if problems else "")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
