"""The short form of kill_workers.py: a few workers and kills, in a folder, on an S3-compatible server and with Ray."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = {"folder": [], "s3": ["moto", "boto3", "obstore"], "ray": ["ray"]}
"""Modules, by where the workers meet."""


@pytest.mark.parametrize(("on", "workers", "kills"), [("folder", "3", "3"), ("s3", "3", "3"), ("ray", "2", "1")])
def test_workers_that_are_killed_at_random_moments_give_the_bytes_of_one_process(
    on: str, workers: str, kills: str, tmp_path: Path
) -> None:
    missing = [name for name in NEEDS[on] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install 'vitrail[ray,s3]' 'moto[server]')")
    script = Path(__file__).with_name("kill_workers.py")
    options = ["--on", on, "--measures", "patches", "--images", "16", "--workers", workers, "--kills", kills]
    command = [sys.executable, script, tmp_path / "out", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("the same ")
