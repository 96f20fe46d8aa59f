"""Where torch is not installed a finished study opens, and what needs a model says what to install.

`fcntl` is hidden too, as Windows has none.
"""

import subprocess
import sys
from pathlib import Path

from synthetic_study import write_study

HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'fcntl', 'torch', 'torchvision', 'timm', 'safetensors', 'sklearn', 'skimage', 'openTSNE', 'accelerate'}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""  # noqa: E501


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + code], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_study_is_read_drawn_and_reported_without_torch(tmp_path: Path) -> None:
    study = write_study(tmp_path, 8)
    ran = run(
        "from vitrail.cli import app\nfrom typer.testing import CliRunner\n"
        f"for command in ('figures', 'report'):\n"
        f"    result = CliRunner().invoke(app, [command, {str(study)!r}])\n"
        "    assert result.exit_code == 0, (command, result.output, result.exception)\n"
        "import vitrail\n"
        f"vitrail.open_study({str(study)!r})\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    assert ran.returncode == 0, ran.stderr
    assert (study / "report.html").is_file()


def test_what_needs_a_model_says_what_to_install() -> None:
    ran = run(
        "import vitrail\n"
        "try: vitrail.open_vit\n"
        "except vitrail.VitrailError as error: print(error)\n"
        "from vitrail.cli import main\n"
        "sys.argv = ['vitrail', 'check', 'vitrail:photos']\nmain()"
    )
    assert ran.returncode == 1
    assert "pip install 'vitrail[models]'" in ran.stdout
    assert "pip install 'vitrail[models]'" in ran.stderr
    assert "Traceback" not in ran.stderr
