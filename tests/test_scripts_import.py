"""Experiments, benchmarks and scripts import what they use: nothing else runs most of them between releases."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from vitrail import Vit, open_vit, run_study

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


def small_vit_and_images(folder: Path, n_images: int) -> Vit:
    """A random ViT of three layers; as many images of noise are put into the folder."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    folder.mkdir()
    for index in range(n_images):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return open_vit(timm.create_model("vit_tiny_patch16_224", **shape).eval(), mean=0.5, std=0.5)


def test_all_scripts_import_what_they_use() -> None:
    scripts = [
        str(path) for folder in ("experiments", "benchmarks", "scripts") for path in (ROOT / folder).glob("*.py")
    ]
    assert len(scripts) > 20
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL, *scripts], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip().endswith(f"imported {len(scripts)}"), run.stdout + run.stderr


def test_one_command_prints_kernel_mask_and_whole_of_block_sparse_attention() -> None:
    before = (ROOT / "docs/wint/sparse.md").read_bytes()
    command = [sys.executable, ROOT / "benchmarks/wint.py", "sparse", "--sides", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tables = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    row = dict(zip(tables[0], next(cells for cells in tables if cells[0] == "4 x 4"), strict=True))
    assert {"kernel", "mask", "whole", "tiles: kernel", "open blocks, %"} <= row.keys()
    assert float(row["largest difference"]) < 1e-5
    assert [cells[0] for cells in tables].count("4 x 4") == 3  # hard edges, soft ones, the mask alone
    assert (ROOT / "docs/wint/sparse.md").read_bytes() == before  # printed, not written


def test_a_study_without_regions_is_told_the_command_that_adds_them_and_then_has_its_table(tmp_path: Path) -> None:
    vit = small_vit_and_images(tmp_path / "photos", 2)
    arguments = [ROOT / "experiments/heads.py", "regions", tmp_path / "study", "--work", tmp_path / "work"]
    for measures in ("head_probability", "head_probability,regions"):
        run_study(vit, tmp_path / "photos", out=tmp_path / "study", measures=measures)
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        if measures == "head_probability":
            assert done.returncode == 1
            assert done.stderr.startswith(f"{tmp_path / 'study'} does not hold head_region_probability. ")
            assert f"vitrail study MODEL PHOTOS --measures heads,regions --out {tmp_path / 'study'}" in done.stderr
            assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert "| head | without it | without class rows and columns | without patches to patches |" in done.stdout


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


def rows_of_findings(study: Path) -> dict[str, str]:
    command = [sys.executable, ROOT / "experiments/findings.py", study]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line[2:].split(": ", 1) for line in done.stdout.splitlines() if line.startswith("- "))


def test_rows_of_findings_are_those_that_a_study_can_answer_with_its_own_numbers(tmp_path: Path) -> None:
    vit = small_vit_and_images(tmp_path / "photos", 9)
    study = run_study(vit, tmp_path / "photos", out=tmp_path / "study", measures="heads,patches")
    rows = rows_of_findings(tmp_path / "study")
    entropy = study["strength_entropy"].to_numpy()[:, 0]
    said = rows["Entropy over hops of L0, nats"]
    assert all(f"L0H{head} {entropy[:, head].mean():.2f} [" in said for head in (0, 1)), said
    assert rows["Sinks take"].startswith(f"L0 {study['sink_share'].to_numpy()[:, 0].mean():.3f}")
    assert not any(claim.startswith(("Grouping", "Which head", "Windows")) for claim in rows)  # no masks, no budget


def test_rows_of_patterns_have_intervals_over_images_and_over_those_held_out(tmp_path: Path) -> None:
    vit = small_vit_and_images(tmp_path / "photos", 60)
    study = run_study(vit, tmp_path / "photos", out=tmp_path / "study", measures="patterns")
    rows = rows_of_findings(tmp_path / "study")
    none = (study["pattern_patch_cluster"].to_numpy() < 0).mean((1, 2))
    assert f"patch patterns {study.sizes['cluster']} clusters, {none.mean():.3f} [" in rows["Patterns of attention"]
    fit = study.attrs["patterns"]["patch"]
    low, high = fit["gain"]
    assert low < fit["pca_error"] - fit["autoencoder_error"] < high
    assert f"[{low:.4f}, {high:.4f}]" in rows["Autoencoder or PCA, held-out error"]
