"""A study that was stopped before any step that writes has the bytes of one left alone. See also faults/kills.py."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_studies import folder_bytes, write_study

from vitrail.study import writing
from vitrail.study.plan import Plan


class Killed(BaseException):
    """Passes every `except Exception`, as the end of a process does."""


class KillAt:
    """Counts steps that change the disk, and stops before the one that was chosen."""

    def __init__(self, step: int) -> None:
        self.left = step

    def before(self, function: Callable[..., object]) -> Callable[..., object]:
        def stopped(*arguments: object, **options: object) -> object:
            self.left -= 1
            if self.left == 0:
                raise Killed
            return function(*arguments, **options)

        return stopped


def test_stopped_before_any_step_that_writes_it_gives_the_same_bytes(
    tmp_path: Path, any_plan: Plan, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(tmp_path / "whole", any_plan, photos)
    expected = folder_bytes(tmp_path / "whole")
    for step in range(1, 200):
        folder = tmp_path / f"stopped {step}"
        kill = KillAt(step)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", kill.before(os.fsync))
            patched.setattr(Path, "replace", kill.before(Path.replace))
            patched.setattr(Path, "rename", kill.before(Path.rename))
            patched.setattr(writing, "_create_array", kill.before(writing._create_array))
            try:
                write_study(folder, any_plan, photos)
            except Killed:
                pass
            else:
                break
        write_study(folder, any_plan, photos)
        assert folder_bytes(folder) == expected, f"stopped before step {step}"
    assert 20 < step < 199
