"""The short forms of kills.py, full_disk.py and two_at_once.py; the long ones are `make faults`."""

import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import MOUNTING

HERE = Path(__file__).parent


def last_lines(script: str, *options: object) -> list[str]:
    command = [sys.executable, HERE / script, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.splitlines()


def test_a_study_that_is_killed_at_random_moments_gives_the_bytes_of_one_left_alone(tmp_path: Path) -> None:
    lines = last_lines("kills.py", tmp_path, "--kills", 4, "--images", 8)
    assert lines[-1].startswith("study: 4 kills")


def test_a_full_disk_is_said_and_what_stopped_there_goes_on(tmp_path: Path) -> None:
    if subprocess.run([*MOUNTING, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets no process mount a small disk of its own")
    lines = last_lines("full_disk.py", "--sizes", 1)
    assert [line.partition(":")[0] for line in lines] == ["study", "training", "report"]


def test_of_two_processes_in_one_folder_one_does_the_work() -> None:
    lines = last_lines("two_at_once.py", "--times", 1)
    assert [line.partition(":")[0] for line in lines] == ["study", "training", "report"]
