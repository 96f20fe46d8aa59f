"""Counts what makes the code hard to read: names that say nothing, and docstrings without sections.

    python scripts/check_words.py [FOLDER ...]          default: src/vitrail
    python scripts/check_words.py --list                with every offence, as path:line

Exits with 1 if a count is above its limit, for all files or, of vague names, for one package.

A function is public if its module's `__all__`, or a public class, names it. Its docstring has `Args:` where it takes
arguments and `Returns:` where it returns something. Names that were replaced by the field's words stay replaced.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PARTICIPLES = frozenset(
    [
        "kept",
        "told",
        "made",
        "taken",
        "drawn",
        "given",
        "held",
        "found",
        "chosen",
        "written",
        "begun",
        "built",
        "shown",
        "seen",
        "lost",
    ]
)
NOT_PARTICIPLES = frozenset(
    ["need", "speed", "seed", "shed", "red", "embed", "feed", "bed", "shared", "nested", "read"]
)
VAGUE = frozenset(
    [
        "found",
        "told",
        "shown",
        "held",
        "kept",
        "asked",
        "given",
        "made",
        "seen",
        "wanted",
        "known",
        "place",
        "there",
        "whole",
    ]
)
REPLACED = (
    "Desk|Shelf|CloseUp|LookedAt|StudyData|Teaching|MapGround|PatternGround|warm_up_epochs|dropped_paths|last_rate|"
    "take_survey|surveyed|silent_layers|ROOMS|OF_ONE_IMAGE|OF_ANY_VIT|_learned|_exported|_evaluated|_begun|disagreement|"
    "figures_of|spare_copy"
)
"""Names whose place the field's words took; as text, such as an old recipe's keys, they stay."""

MAX_PARTICIPLES = 0.02
"""Share of all functions: some adjectives (`centred_boxes`) are the field's own words."""

MAX_VAGUE = 8.0
"""Per 1,000 names, in every package."""

MIN_NAMES = 1000
"""A folder with fewer names is judged with all others only: one name more would decide."""


class Offence(NamedTuple):
    """One place to mend."""

    kind: str
    path: Path
    line: int
    name: str


class Counts(NamedTuple):
    """What was counted, and where it was found."""

    n_functions: int
    n_names: int
    n_public: int
    offences: list[Offence]

    def of(self, kind: str) -> int:
        """The number of offences of a kind."""
        return sum(offence.kind == kind for offence in self.offences)


def count(folders: list[Path]) -> Counts:
    """Counts over all Python files below the folders."""
    n_functions = n_names = n_public = 0
    offences: list[Offence] = []
    for path in sorted(file for folder in folders for file in folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        functions = [each for each in ast.walk(tree) if _is_function(each) and not _is_property(each)]
        n_functions += len(functions)
        offences += [
            Offence("participle", path, each.lineno, each.name) for each in functions if _participle(each.name)
        ]
        names = [each for each in ast.walk(tree) if isinstance(each, ast.Name)]
        n_names += len(names)
        offences += [Offence("vague", path, each.lineno, each.id) for each in names if each.id in VAGUE]
        offences += [
            Offence("replaced", path, 1 + text.count("\n", 0, match.start()), match[0])
            for match in re.finditer(rf"(?<![\"'`])\b({REPLACED})\b", text)
        ]
        public = list(_public(tree))
        n_public += len(public)
        offences += [
            Offence(f"without {what}", path, each.lineno, each.name) for each in public for what in _lacks(each)
        ]
    return Counts(n_functions, n_names, n_public, offences)


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("__")


def _is_property(node: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(each) for each in node.decorator_list)


def _participle(name: str) -> bool:
    first = name.strip("_").split("_")[0]
    return first in PARTICIPLES or (first.endswith("ed") and first not in NOT_PARTICIPLES)


def _public(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    exported: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(each, "id", "") == "__all__" for each in node.targets):
            exported = set(ast.literal_eval(node.value))
    for node in tree.body:
        if _is_function(node) and node.name in exported:
            yield node
        if isinstance(node, ast.ClassDef) and node.name in exported:
            yield from (
                each
                for each in node.body
                if _is_function(each) and not each.name.startswith("_") and not _is_property(each)
            )


def _lacks(function: ast.FunctionDef) -> list[str]:
    text = ast.get_docstring(function) or ""
    arguments = [
        each.arg for each in (*function.args.args, *function.args.kwonlyargs) if each.arg not in ("self", "cls")
    ]
    lacks = [] if text else ["docstring"]
    if arguments and "Args:" not in text:
        lacks.append("Args")
    returns = "None" if function.returns is None else ast.unparse(function.returns)
    if returns not in ("None", "NoReturn") and not re.search(r"\b(Returns|Yields):", text):
        lacks.append("Returns")
    return lacks


def excesses(counts: Counts, packages: dict[str, Counts]) -> list[str]:
    """A sentence for each count that is above its limit."""
    lines = []
    if counts.of("participle") > MAX_PARTICIPLES * counts.n_functions:
        lines.append(f"more than {MAX_PARTICIPLES:.0%} of the functions are named by a participle")
    for name, each in {"all": counts, **packages}.items():
        if each.n_names >= MIN_NAMES and each.of("vague") > MAX_VAGUE * each.n_names / 1000:
            lines.append(
                f"{name}: {1000 * each.of('vague') / each.n_names:.1f} vague names per 1,000, {MAX_VAGUE:g} at most"
            )
    if counts.of("replaced"):
        lines.append("names are back whose place the field's words took")
    kinds = ("without docstring", "without Args", "without Returns")
    lines += [f"{counts.of(kind)} public functions are {kind}" for kind in kinds if counts.of(kind)]
    return lines


def report(counts: Counts) -> str:
    """The counts in lines."""
    participles, vague = counts.of("participle"), counts.of("vague")
    lines = [
        f"functions {counts.n_functions}, named by a participle {participles} "
        f"({participles / max(counts.n_functions, 1):.1%})",
        f"vague names per 1,000: {1000 * vague / max(counts.n_names, 1):.1f}",
        f"names that were replaced: {counts.of('replaced')}",
        f"public functions {counts.n_public}, without a docstring {counts.of('without docstring')}, without Args "
        f"{counts.of('without Args')}, without Returns {counts.of('without Returns')}",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Counts, prints, and says whether a limit is exceeded."""
    folders = [Path(each) for each in arguments if each != "--list"] or [Path("src/vitrail")]
    counts = count(folders)
    if "--list" in arguments:
        for offence in counts.offences:
            print(f"{offence.path}:{offence.line}: {offence.kind}: {offence.name}")
    print(report(counts))
    inner = sorted(each for folder in folders for each in folder.iterdir() if each.is_dir())
    too_much = excesses(counts, {each.name: count([each]) for each in inner})
    print(*too_much, sep="\n", end="\n" if too_much else "")
    return int(bool(too_much))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
