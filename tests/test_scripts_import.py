"""Experiments, benchmarks and scripts import what they use: nothing else runs most of them between releases."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORT_ALL = """
import runpy, sys, traceback
from pathlib import Path
failed = 0
for path in sys.argv[1:]:
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="imported")
    except ImportError:
        failed += 1
        print(path, traceback.format_exc())
    sys.path.pop(0)
    for name in [name for name, module in sys.modules.items() if Path(path).parent.as_posix() in
                 (getattr(module, "__file__", None) or "")]:
        del sys.modules[name]
print("imported", len(sys.argv[1:]) - failed)
"""


def test_all_scripts_import_what_they_use() -> None:
    scripts = [
        str(path) for folder in ("experiments", "benchmarks", "scripts") for path in (ROOT / folder).glob("*.py")
    ]
    assert len(scripts) > 20
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL, *scripts], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip().endswith(f"imported {len(scripts)}"), run.stdout + run.stderr


def test_chunks_of_robustness_are_joined_as_they_were_kept(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from tokens import joined, save_part, with_probes
from vitrail.tokens.robustness import all_probes
folder = Path(sys.argv[2])
for name, n in (("a", 3), ("b", 2)):
    responses = {"drift": np.full((n, 4), n)}
    save_part(folder / f"{name}.npz", with_probes(all_probes((2, 2)), np.ones(n, bool), np.zeros(n), responses))
whole = joined(sorted(folder.glob("?.npz")))
print(len(whole["intact_correct"]), whole["drift"].shape, "Occlusion" in str(whole["probes"]))
"""
    command = [sys.executable, "-c", code, ROOT / "experiments", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "5 (5, 4) True", done.stderr
