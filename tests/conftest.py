"""For all tests: shapes in type hints are checked, and real models and photographs are found where they exist."""

import os
import shutil
import tempfile
from pathlib import Path

import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads that wait for each other cost more than they give

# What the libraries keep between runs stays inside the repository's build folder.
os.environ.setdefault("MPLCONFIGDIR", str(ROOT / ".build" / "matplotlib"))
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / ".build" / "hypothesis"))

jaxtyping.install_import_hook("vitrail", "beartype.beartype")

_COMPILED = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Compiled kernels of this process alone: what another run or worker has left half-written decides no test."""
    config.stash[_COMPILED] = Path(tempfile.mkdtemp(prefix="vitrail-compiled-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(config.stash[_COMPILED])


def pytest_unconfigure(config: pytest.Config) -> None:
    """A worker's process ends without its exit handlers, so the folder is removed here."""
    shutil.rmtree(config.stash[_COMPILED], ignore_errors=True)


_SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and photographs, beside the repository; tests that need it are skipped without."""
    if not (_SHARED / "data").is_dir():
        pytest.skip("the folder ../shared with real models and photographs is not here")
    return _SHARED
