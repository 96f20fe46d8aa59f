"""Studies in object stores: in memory and on a real S3-compatible server they have the bytes of a study in a folder."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("obstore", reason="obstore is not installed: pip install 'vitrail[s3]'")

from tiny_studies import BATCH_SIZE, folder_bytes

from vitrail.data import open_images
from vitrail.errors import DataError, PlanMismatch, StudyError, UsageError, WeightsMismatch
from vitrail.models.open import Vit, open_vit
from vitrail.study import locking, object_leases
from vitrail.study.object_leases import ObjectLeases
from vitrail.study.object_store import OBJECTS, ObjectStudy, open_objects
from vitrail.study.run import run_study
from vitrail.study.store import open_study
from vitrail.study.writing import StudyFolder

MEASURES = "prefix_share,token_norm,head_probability"


def run(vit: Vit, photos: Path, out: object, **options: object) -> Any:
    return run_study(vit, photos, out=out, **{"batch_size": BATCH_SIZE, "measures": MEASURES, **options})  # type: ignore[arg-type]


def objects_of(address: str) -> dict[str, str]:
    """SHA-256 of every object of a study, by key, as `folder_bytes` gives those of a folder."""
    study = open_objects(address)
    keys = {each["path"] for page in study.store.list() for each in page}
    assert all(OBJECTS.fullmatch(key) for key in keys), keys
    study.pull(values=True)
    files = folder_bytes(study.folder)
    assert files.keys() == keys
    return files


@pytest.fixture(scope="module")
def whole(vit: Vit, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of the study of one process in a folder."""
    out = tmp_path_factory.mktemp("whole") / "study"
    run(vit, photos, out, part_images=BATCH_SIZE)
    return folder_bytes(out)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3-compatible server on loopback with a bucket."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed: pip install 'moto[server]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patched.setenv("AWS_ACCESS_KEY_ID", "key")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patched.setenv("AWS_REGION", "us-east-1")
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


class TestBytes:
    def test_a_store_in_memory_has_what_a_folder_has(self, vit: Vit, photos: Path, whole: dict[str, str]) -> None:
        study = run(vit, photos, "memory://study", part_images=BATCH_SIZE)
        assert objects_of("memory://study") == whole
        assert open_study("memory://study").identical(study)

    def test_on_an_s3_server_a_study_is_stopped_resumed_and_grown(
        self, vit: Vit, photos: Path, whole: dict[str, str], server: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        address, write, written = f"{server}/folder/study", StudyFolder.write_part, []

        def stop_after_one(study: StudyFolder, part: Any, arrays: Any) -> None:
            if written:
                raise KeyboardInterrupt
            write(study, part, arrays)
            written.append(part)

        few = {"measures": "prefix_share", "limit": 9, "part_images": BATCH_SIZE}
        with monkeypatch.context() as patched:
            patched.setattr(StudyFolder, "write_part", stop_after_one)
            with pytest.raises(KeyboardInterrupt):
                run(vit, photos, address, **few)
        with pytest.raises(StudyError, match=rf"{address} has 1 of 3 parts"):
            open_study(address)
        run(vit, photos, address, **few)
        run(vit, photos, Path(address), part_images=BATCH_SIZE)  # a `Path` has joined two slashes
        assert objects_of(address) == whole

    def test_a_part_that_is_completed_during_a_download_is_no_damage(
        self, vit: Vit, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        address = "memory://during"
        run(vit, photos, address, measures="prefix_share", part_images=BATCH_SIZE)
        study, download = open_objects(address), ObjectStudy._download
        names = [each["path"] for page in study.store.list() for each in page]
        late = {key: study.store.get(key).bytes() for key in names if key.startswith("parts/00002") or "/c/2/" in key}
        for key in late:
            study.store.delete(key)

        def download_and_complete(study: ObjectStudy, key: str) -> None:
            download(study, key)
            if late:  # after the first object, the last part is completed
                for name in sorted(late, key=lambda each: each.startswith("parts/")):
                    study.store.put(name, late.pop(name))

        monkeypatch.setattr(ObjectStudy, "_download", download_and_complete)
        assert open_study(address, partial=True).sizes["image"] == 8
        assert open_study(address).sizes["image"] == 11

    def test_a_worker_that_was_ended_while_it_uploaded_arrays_or_listed_them(
        self, vit: Vit, photos: Path, whole: dict[str, str]
    ) -> None:
        address = "memory://cut"
        run(vit, photos, address, part_images=BATCH_SIZE)
        study = open_objects(address)
        kept = {"study.json", "images.json", "model.json", ".vitrail-study", "arrays.zarr/token_norm/zarr.json"}
        for key in [each["path"] for page in study.store.list() for each in page]:
            if key not in kept:
                study.store.delete(key)
        run(vit, photos, address, part_images=BATCH_SIZE)
        assert objects_of(address) == whole


class TestLeases:
    @pytest.fixture
    def study(self, request: pytest.FixtureRequest) -> ObjectStudy:
        return open_objects(f"memory://{request.node.name}")

    def test_one_worker_holds_a_lease_until_it_gives_it_back(self, study: ObjectStudy) -> None:
        first, second = ObjectLeases(study), ObjectLeases(study)
        assert first.acquire("00001")
        assert not second.acquire("00001")
        first.release("00001")
        assert second.acquire("00001")
        second.release_all()
        assert not list(study.store.list())

    def test_a_lease_of_an_ended_process_is_free_at_once_and_one_worker_takes_it(self, study: ObjectStudy) -> None:
        ended = {"pid": 4194305, "host": socket.gethostname(), "token": "0", "renewed": 1}
        study.store.put("leases/worker-0000", json.dumps(ended).encode())
        first, second = ObjectLeases(study), ObjectLeases(study)
        assert not first.others()
        assert first.acquire("worker-0000")
        assert not second.acquire("worker-0000")
        assert second.others()
        first.release_all()

    def test_workers_of_other_machines_are_at_work_if_they_renew_their_leases(
        self, study: ObjectStudy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(object_leases, "LEASE_S", 0.2)
        monkeypatch.setattr(object_leases, "LOOK_S", 0.05)
        other = {"pid": 1, "host": "another", "token": "0", "renewed": 1}
        study.store.put("leases/worker-0000", json.dumps(other).encode())
        with pytest.warns(RuntimeWarning, match="Process 1 on another was at work on memory://"):
            assert not ObjectLeases(study).others()
        monkeypatch.setattr(object_leases, "LEASE_S", 30)
        renewed = json.dumps({**other, "renewed": 2}).encode()
        monkeypatch.setattr("time.sleep", lambda _: study.store.put("leases/worker-0000", renewed))
        with pytest.warns(RuntimeWarning, match="Process 1 on another was at work on memory://"):
            assert ObjectLeases(study).others()

    def test_a_lease_of_another_machine_is_free_once_nobody_has_renewed_it_for_a_while(
        self, study: ObjectStudy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leases, now, other = ObjectLeases(study), 1000.0, {"pid": 1, "host": "another", "token": "0", "renewed": 1}
        study.store.put("leases/00001", json.dumps(other).encode())
        monkeypatch.setattr("time.monotonic", lambda: now)
        assert not leases.acquire("00001")
        now += locking.LEASE_S - 1
        study.store.put("leases/00001", json.dumps({**other, "renewed": 2}).encode())
        assert not leases.acquire("00001")
        now += locking.LEASE_S
        assert leases.acquire("00001")
        leases.release_all()


class TestRefusals:
    def test_a_store_that_holds_other_objects_or_another_plan(self, vit: Vit, photos: Path) -> None:
        open_objects("memory://others").store.put("thesis.pdf", b"mine")
        with pytest.raises(StudyError, match=r"memory://others holds other objects \(thesis\.pdf\) and no study"):
            run(vit, photos, "memory://others")
        run(vit, photos, "memory://plan", measures="prefix_share", limit=4)
        with pytest.raises(PlanMismatch, match=r"memory://plan was begun with another plan:\n  batch size"):
            run(vit, photos, "memory://plan", measures="prefix_share", limit=4, batch_size=2)

    def test_a_store_that_does_not_answer(self, vit: Vit, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setattr("vitrail.study.object_store.RETRIES", 0)
        with pytest.raises(StudyError, match=r"store of s3://bucket/study does not do what was asked.*safe; when it"):
            run(vit, photos, "s3://bucket/study")

    @pytest.mark.parametrize("address", ["http://host/study", "file:///tmp/study", "nonsense://host/study"])
    def test_addresses_that_are_no_object_store(self, vit: Vit, photos: Path, address: str) -> None:
        with pytest.raises(UsageError, match=r"is no object store"):
            run(vit, photos, address)

    def test_images_masks_and_weights_at_an_address(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"s3://bucket/images is an address, and images are read from local"):
            open_images("s3://bucket/images")
        with pytest.raises(DataError, match=r"s3://bucket/masks is an address"):
            run(vit, photos, tmp_path / "study", masks="s3://bucket/masks", measures="heads")
        with pytest.raises(WeightsMismatch, match=r"There is no weights file s3:/bucket/vit\.safetensors"):
            open_vit("timm:vit_tiny_patch16_224", weights="s3://bucket/vit.safetensors")
        assert not any(name.startswith("s3") for name in os.listdir())
