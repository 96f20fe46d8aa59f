"""For all tests: shapes in type hints are checked, and real models and photographs are found where they exist."""

import os
from pathlib import Path

import jaxtyping
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads that wait for each other cost more than they give

jaxtyping.install_import_hook("vitrail", "beartype.beartype")

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and photographs, beside the repository; tests that need it are skipped without."""
    if not (_SHARED / "data").is_dir():
        pytest.skip("the folder ../shared with real models and photographs is not here")
    return _SHARED
