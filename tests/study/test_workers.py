"""Workers on one study: who may join, what a lease is worth, and that whatever goes wrong is refused or harmless."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from tiny_studies import BATCH_SIZE, DEAD_LOCK, folder_bytes, write_photos

from vitrail.errors import DataError, PlanMismatch, StudyError
from vitrail.models.open import Vit
from vitrail.study import locking, planning
from vitrail.study.locking import Lease, Leases, presence
from vitrail.study.ownership import write_access
from vitrail.study.plan import Part
from vitrail.study.run import run_study
from vitrail.study.store import verify
from vitrail.study.writing import StudyFolder

MEASURES = "prefix_share,token_norm"


def run(vit: Vit, photos: Path, out: Path, **options: object) -> xr.Dataset:
    return run_study(vit, photos, out=out, **{"batch_size": BATCH_SIZE, "measures": MEASURES, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(vit: Vit, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of one process."""
    out = tmp_path_factory.mktemp("whole") / "study"
    before, planning.PART_IMAGES = planning.PART_IMAGES, BATCH_SIZE
    try:
        run(vit, photos, out)
    finally:
        planning.PART_IMAGES = before
    return out


@pytest.fixture
def begun(whole: Path, tmp_path: Path) -> Path:
    """The same study without its second part."""
    out = tmp_path / "study"
    shutil.copytree(whole, out)
    (out / "parts" / "00001.json").unlink()
    return out


class TestJoining:
    def test_one_worker_alone_writes_the_study_of_one_process(
        self, vit: Vit, photos: Path, whole: Path, tmp_path: Path
    ) -> None:
        run(vit, photos, tmp_path / "study", worker=True)
        assert folder_bytes(tmp_path / "study") == folder_bytes(whole)

    def test_a_worker_adds_a_measure_to_a_study_that_nobody_works_on(
        self, vit: Vit, photos: Path, whole: Path, tmp_path: Path
    ) -> None:
        run(vit, photos, tmp_path / "study", measures="prefix_share", limit=6)
        run(vit, photos, tmp_path / "study", worker=True)
        assert folder_bytes(tmp_path / "study") == folder_bytes(whole)

    def test_a_worker_leaves_what_others_compute_and_finishes_the_rest(
        self, vit: Vit, photos: Path, whole: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (begun / "parts" / "00002.json").unlink()
        other = Leases(begun)
        written: list[int] = []
        write = StudyFolder.write_part

        def write_and_end_the_other(study: StudyFolder, part: Part, arrays: dict[str, np.ndarray]) -> None:
            write(study, part, arrays)
            written.append(part.number)
            other.release_all()

        with presence(begun):
            assert other.acquire("00001")
            monkeypatch.setattr(StudyFolder, "write_part", write_and_end_the_other)
            run(vit, photos, begun, worker=True)
        assert written == [2, 1]
        assert folder_bytes(begun) == folder_bytes(whole)

    def test_a_process_that_writes_alone_and_workers_refuse_each_other(
        self, vit: Vit, photos: Path, begun: Path
    ) -> None:
        with presence(begun), pytest.raises(StudyError, match=rf"Process {os.getpid()} on .* join it with --worker"):
            run(vit, photos, begun)
        with locking.folder_lock(begun), pytest.raises(StudyError, match=f"Process {os.getpid()} on .* is writing"):
            run(vit, photos, begun, worker=True)

    def test_a_worker_that_asks_for_more_than_those_at_work_is_refused(
        self, vit: Vit, photos: Path, begun: Path
    ) -> None:
        before = folder_bytes(begun)
        with (
            presence(begun),
            pytest.raises(StudyError, match=r"asks for more than they do \(measures, hub: the folder"),
        ):
            run(vit, photos, begun, measures="hub", worker=True)
        assert folder_bytes(begun) == before

    def test_a_worker_with_another_version_of_a_library_is_refused(
        self, vit: Vit, photos: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version = metadata.version
        monkeypatch.setattr(metadata, "version", lambda name: "0.9" if name == "timm" else version(name))
        with pytest.raises(PlanMismatch, match=r'versions, timm: the folder has .* this run "0\.9"'):
            run(vit, photos, begun, worker=True)

    def test_a_worker_on_another_kind_of_device_is_refused_unless_it_may_be_mixed(
        self, vit: Vit, photos: Path, whole: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(planning, "_device_name", lambda _: "GPU of this machine")
            run(vit, photos, begun.with_name("gpu"), worker=True, limit=4)
            patched.setattr(planning, "_device_name", lambda _: "another GPU")
            with pytest.raises(PlanMismatch, match=r"(?s)name of the device: .* With --allow-mixed it goes on here"):
                run(vit, photos, begun.with_name("gpu"), worker=True, limit=4)
            mixed = run(vit, photos, begun.with_name("gpu"), worker=True, allow_mixed=True, limit=4)
        assert mixed.attrs["device_name"] == "GPU of this machine"
        run(vit, photos, begun)  # of a processor there is no name
        assert folder_bytes(begun) == folder_bytes(whole)

    def test_an_image_that_changed_after_the_study_began_is_named(self, vit: Vit, tmp_path: Path) -> None:
        photos = write_photos(tmp_path / "photos", 6)
        run(vit, photos, tmp_path / "study")
        (tmp_path / "study" / "parts" / "00001.json").unlink()
        file = photos / "class 1" / "5.png"
        content, times = bytearray(file.read_bytes()), os.stat(tmp_path / "study" / "images.json")
        content[-20] ^= 1  # the same size, and older than the study as far as the file says
        file.write_bytes(content)
        os.utime(tmp_path / "study" / "images.json", (times.st_atime + 3600, times.st_mtime + 3600))
        with pytest.raises(DataError, match=r"Image class 1/5\.png has changed"):
            run(vit, photos, tmp_path / "study", worker=True)


class TestHarm:
    def test_ended_between_an_array_and_the_file_of_its_part_another_worker_writes_the_same_bytes(
        self, vit: Vit, photos: Path, whole: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.rmtree(begun / "arrays.zarr" / "token_norm" / "c" / "1")
        with monkeypatch.context() as patched:
            patched.setattr(StudyFolder, "_mark", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            child = os.fork()
            if child == 0:
                run(vit, photos, begun, worker=True)
                os._exit(0)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert {path.name for path in (begun / "leases").iterdir()} == {"00001", "worker-0000"}
        run(vit, photos, begun, worker=True)
        assert folder_bytes(begun) == folder_bytes(whole)

    def test_two_workers_that_both_hold_a_lease_write_the_same_bytes(
        self, vit: Vit, photos: Path, whole: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = StudyFolder.write_part

        def write_twice(study: StudyFolder, part: Part, arrays: dict[str, np.ndarray]) -> None:
            monkeypatch.setattr(StudyFolder, "write_part", write)
            shutil.rmtree(begun / "leases")  # as if another had taken it for one that ended
            run(vit, photos, begun, worker=True)
            write(study, part, arrays)

        monkeypatch.setattr(StudyFolder, "write_part", write_twice)
        run(vit, photos, begun, worker=True)
        assert folder_bytes(begun) == folder_bytes(whole)
        assert verify(begun) == 3

    def test_a_process_whose_lock_was_taken_while_it_did_not_run_stops(
        self, vit: Vit, photos: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Lease, "is_lost", True)
        with pytest.raises(StudyError, match=r"another has begun to write .* What was written is safe"):
            run(vit, photos, begun)

    @pytest.mark.parametrize("as_worker", [True, False])
    def test_files_of_processes_killed_while_they_took_a_lease_over_are_not_left_in_a_complete_study(
        self, vit: Vit, photos: Path, whole: Path, begun: Path, as_worker: bool
    ) -> None:
        places = [".lock.break.4194305.0a", ".lock-opening.break.4194305.0b", "leases/00000.break.4194305.0c"]
        (begun / "leases").mkdir()
        for place, content in zip(places, ("", "filelock/break\n4194305\n", ""), strict=True):
            (begun / place).write_text(content, encoding="utf-8")
            os.utime(begun / place, (0, 0))  # long enough ago that nobody will write a name into it
        run(vit, photos, begun, worker=as_worker)
        assert folder_bytes(begun) == folder_bytes(whole)
        assert not (begun / "leases").exists()

    def test_a_study_begins_where_a_process_was_killed_while_it_took_the_lock_over(
        self, vit: Vit, photos: Path, whole: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "study").mkdir()
        (tmp_path / "study" / ".lock.break.4194305.0a").touch()
        run(vit, photos, tmp_path / "study")
        assert folder_bytes(tmp_path / "study") == folder_bytes(whole)


class TestLeases:
    def test_a_lease_is_held_whatever_the_clocks_say(self, tmp_path: Path) -> None:
        first, second = Lease(tmp_path / "lease"), Lease(tmp_path / "lease")
        assert first.acquire()
        for time in (0, 4e9):  # of a machine whose clock is far behind, or far ahead
            os.utime(tmp_path / "lease", (time, time))
            assert not second.acquire()
        first.release()
        assert second.acquire()
        second.release()

    def test_a_lease_of_another_machine_is_taken_once_nobody_has_touched_it_for_a_while(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lease, now = Lease(tmp_path / "lease"), 1000.0
        (tmp_path / "lease").write_text(DEAD_LOCK.replace("host=", "host=another-"), encoding="utf-8")
        monkeypatch.setattr("time.monotonic", lambda: now)
        assert not lease.acquire()
        now += locking.LEASE_S - 1
        assert not lease.acquire()
        os.utime(tmp_path / "lease")  # its holder touches it
        now += 2
        assert not lease.acquire()
        now += locking.LEASE_S
        assert lease.acquire()
        lease.release()

    @pytest.mark.parametrize("name", [".lock", "leases/worker-0000"])
    def test_a_writer_that_died_on_another_machine_does_not_block_the_study(
        self, begun: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setattr(locking, "LEASE_S", 0.5)
        content = DEAD_LOCK.replace("host=", "host=another-").replace("duration=30.0", "duration=0.5")
        (begun / name).parent.mkdir(exist_ok=True)
        (begun / name).write_text(content, encoding="utf-8")
        with (
            pytest.warns(RuntimeWarning, match="on another-.* was at work on .*Looking for up to"),
            write_access(begun),
        ):
            pass
        assert not (begun / name).exists()
        (begun / "leases").mkdir(exist_ok=True)
        (begun / "leases" / "00001").write_text(content, encoding="utf-8")
        with pytest.warns(RuntimeWarning, match="Looking for up to"):
            locking.Leases(begun).sweep()
        assert not (begun / "leases").exists()

    @pytest.mark.filterwarnings("ignore:Process .* was at work on")
    @pytest.mark.parametrize("name", [".lock", "leases/worker-0000"])
    def test_a_writer_that_lives_on_another_machine_is_named_as_soon_as_it_touches_its_lease(
        self, begun: Path, name: str
    ) -> None:
        (begun / name).parent.mkdir(exist_ok=True)
        (begun / name).write_text(DEAD_LOCK.replace("host=", "host=another-"), encoding="utf-8")
        touch = threading.Timer(0.5, os.utime, [begun / name])
        touch.start()
        with pytest.raises(StudyError, match="Process 4194305 on another-"), write_access(begun):
            pass
        touch.join()
        assert (begun / name).exists()

    def test_a_lease_of_a_killed_process_is_free_at_once(self, tmp_path: Path) -> None:
        program = (
            "import sys, os, signal; from pathlib import Path; from vitrail.study.locking import Lease; "
            "assert Lease(Path(sys.argv[1])).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
        )
        done = subprocess.run([sys.executable, "-c", program, tmp_path / "lease"], check=False)
        assert done.returncode == -signal.SIGKILL
        lease = Lease(tmp_path / "lease")
        assert lease.acquire()
        lease.release()

    def test_the_number_of_threads_is_put_back(self, vit: Vit, photos: Path, begun: Path) -> None:
        before = torch.get_num_threads()
        run(vit, photos, begun, worker=True)
        assert torch.get_num_threads() == before
