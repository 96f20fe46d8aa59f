"""Engines: what they refuse. That Ray's actors give the bytes of one process is tested in tests/faults."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from vitrail.errors import MissingLibrary, StudyError, UsageError
from vitrail.models.open import Vit, open_vit
from vitrail.study.run import run_study


class RayThatDoesNotStart(ModuleType):
    """On a machine with too much to do."""

    def __init__(self) -> None:
        super().__init__("ray")

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: object) -> None:
        if options.get("address"):
            raise ConnectionError("no cluster runs here")
        assert options["num_cpus"] == 77  # room for all workers
        raise Exception("The current node timed out during startup.\nThis could happen because ..")  # noqa: TRY002


def test_what_no_engine_can_do_is_refused_before_anything_is_written(
    vit: Vit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(vit: Vit, **options: object) -> None:
        run_study(vit, photos, out=tmp_path / "study", measures="prefix_share", **options)  # type: ignore[arg-type]

    with pytest.raises(UsageError, match=r"There is no engine 'spark'; choose from local, ray"):
        run(vit, engine="spark")
    with pytest.raises(UsageError, match=r"0 workers were asked for"):
        run(vit, engine="ray", n_workers=0)
    with pytest.raises(UsageError, match=r"cannot be opened by its name on other machines.*--worker"):
        run(vit, engine="ray", n_workers=2)
    with pytest.raises(UsageError, match=r"A part of 0 images"):
        run(vit, part_images=0)
    monkeypatch.setitem(sys.modules, "ray", RayThatDoesNotStart())
    with pytest.raises(StudyError, match=r"Ray does not start, .* \(The current node timed out during startup\.\)"):
        run(open_vit("vitrail:photos"), engine="ray", n_workers=77)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingLibrary, match=r"pip install 'vitrail\[ray\]', or start workers yourself with --worker"):
        run(open_vit("vitrail:photos"), engine="ray", n_workers=2)
    assert not (tmp_path / "study").exists()
