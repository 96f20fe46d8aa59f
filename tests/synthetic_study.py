"""A study with planted values, written by the same code as a real one, for tests of what reads studies.

What is planted: pruning L0H1 costs everything where the label is 0, and half where it is 1; pruning L11H0 costs 0.3
everywhere; no other head costs more than 0.02. Heads reach `reach(layer, head)` hops. Every seventh image is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr
from PIL import Image, ImageDraw

from vitrail.analysis import analyses, declaration, measures
from vitrail.data import open_images, scan
from vitrail.study.plan import THUMBNAIL_PX, ModelIdentity, Part, Plan
from vitrail.study.store import open_study, read_manifest, read_plan
from vitrail.study.writing import StudyFolder

CLASSES = ["disc", "square", "ring", "cross", "bars, vertical", "triangle"]
SIZE, GRID, PREFIX = 112, 14, 1
N_LAYERS, N_HEADS, N_HOPS = 12, 3, 14


def reach(layer: int, head: int, n_layers: int = N_LAYERS) -> float:
    """How many hops a head's strength falls off over: short and long heads early, long ones late."""
    early = (0.6, 2.0, 9.0)[head % 3]
    return early + (9.0 - early) * layer / max(1, n_layers - 1)


def photograph(image: int, label: int) -> Image.Image:
    """A shape on a ground, the label its form."""
    rng = np.random.default_rng(image)
    ground = tuple(int(v) for v in rng.integers(40, 120, 3))
    ink = tuple(int(v) for v in rng.integers(140, 255, 3))
    picture = Image.new("RGB", (SIZE + 20, SIZE), ground)
    draw = ImageDraw.Draw(picture)
    x, y, r = (int(v) for v in (rng.integers(40, 90), rng.integers(40, 70), rng.integers(18, 34)))
    box = (x - r, y - r, x + r, y + r)
    if label == 0:
        draw.ellipse(box, fill=ink)
    elif label == 1:
        draw.rectangle(box, fill=ink)
    elif label == 2:
        draw.ellipse(box, outline=ink, width=7)
    elif label == 3:
        draw.line((x - r, y - r, x + r, y + r), fill=ink, width=8)
        draw.line((x - r, y + r, x + r, y - r), fill=ink, width=8)
    elif label == 4:
        for offset in range(-r, r, 12):
            draw.line((x + offset, y - r, x + offset, y + r), fill=ink, width=5)
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=ink)
    return picture


def entropy(strength: np.ndarray) -> np.ndarray:
    share = strength / strength.sum(axis=-1, keepdims=True)
    return -(share * np.log(share)).sum(axis=-1)


def measures_of(
    label: np.ndarray, seed: int, n_layers: int = N_LAYERS, n_heads: int = N_HEADS, n_hops: int = N_HOPS
) -> dict[str, np.ndarray]:
    """Every measure for images with these labels."""
    rng = np.random.default_rng(seed)
    n, shape = len(label), (len(label), n_layers, n_heads)
    wrong = np.arange(seed, seed + n) % 7 == 3
    prediction = np.where(wrong, (label + 1) % len(CLASSES), label).astype(np.int32)
    probability = np.where(wrong, rng.uniform(0.1, 0.4, n), rng.uniform(0.75, 0.99, n)).astype(np.float32)
    drop = rng.uniform(-0.01, 0.02, shape)
    drop[:, 0, 1 % n_heads] += np.select([label == 0, label == 1], [0.97 * probability, 0.5 * probability], 0)
    drop[:, -1, 0] += 0.3 * probability
    pruned = np.clip(probability[:, None, None] - drop, 1e-6, 1)
    hops = np.arange(n_hops)
    scale = np.array([[reach(layer, head, n_layers) for head in range(n_heads)] for layer in range(n_layers)])
    scale = scale * np.exp(rng.normal(0, 0.12, shape))
    strength = 0.03 * np.exp(-hops / scale[..., None]) + 0.002
    distance = (strength * hops * (hops + 1)).sum(-1) / (strength * (hops + 1)).sum(-1)
    shift = np.abs(drop) * 0.2 + rng.uniform(0, 0.01, shape)
    given = {
        "label": label,
        "prediction": prediction,
        "probability": probability,
        "head_probability": pruned,
        "head_divergence": np.clip(np.abs(drop) * 0.8, 0, 1),
        "head_loss_change": np.log(probability[:, None, None]) - np.log(pruned),
        "head_flip": (pruned < 0.4) & ~wrong[:, None, None],
        "head_cls_shift": shift,
        "head_token_shift": shift * 0.6,
        "head_cls_shift_l2": np.sqrt(shift),
        "head_token_shift_l2": np.sqrt(shift) * 0.7,
        "attention_strength": strength,
        "strength_entropy": entropy(strength),
        "attention_distance": distance,
        "prefix_share": rng.uniform(0.02, 0.2, shape),
    }
    return {name: np.asarray(values, dtype=declaration(name).dtype) for name, values in given.items()}


def plan_of(n_images: int, digest: str, **changes: object) -> Plan:
    fields: dict[str, object] = {
        "model": "planted:vit_of_shapes", "weight_digest": "0" * 64, "n_classes": len(CLASSES),
        "class_names": CLASSES, "n_layers": N_LAYERS, "n_heads": [N_HEADS] * N_LAYERS, "grid": [GRID, GRID],
        "prefix": PREFIX, "grids": [[GRID, GRID]] * N_LAYERS, "prefixes": [PREFIX] * N_LAYERS, "class_token": True,
        "preprocessing": {
            "size": [SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3,
            "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
        },
        "data_digest": digest, "n_images": n_images, "labels_from": "names of the class folders", "labels": "given",
        "measures": {name: measure.version for name, measure in measures().items()}, "left_out": {}, "options": {},
        "precision": "float32", "batch_size": 64, "part_size": 64, "seed": 0, "device": "cpu", "threads": 1,
        "versions": {},
    }  # fmt: skip
    return Plan(**{**fields, **changes})  # type: ignore[arg-type]


def windows_of(n: int) -> dict[str, np.ndarray]:
    """Planted windows: head h of layer l sees h + 1 patches each way and has (l + 1) * (h + 1) / 100 of the budget."""
    layer, head = np.meshgrid(np.arange(N_LAYERS), np.arange(N_HEADS), indexing="ij")
    place = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID), indexing="ij"), -1).reshape(-1, 2)
    row, column = place.T
    room = np.stack([column, row, GRID - 1 - column, GRID - 1 - row], -1)
    sides = np.minimum(room[None, None], (head + 1)[..., None, None])
    area = ((sides[..., 0] + sides[..., 2] + 1) * (sides[..., 1] + sides[..., 3] + 1)).mean(-1) / GRID**2
    share = (layer + 1) * (head + 1) / 100
    given = {
        "head_window_area": share,
        "head_window_divergence": 0.02,
        "head_window_divergence_equal": 0.05,
        "head_window_flip": False,
        "head_window_flip_equal": True,
        "predicted_window": sides,
        "predicted_area": area,
        "predicted_overlap": 0.5 + share,
        "predicted_overlap_open": 0.4 + share,
        "predicted_overlap_moved": 0.1 + share,
    }
    return {
        name: np.broadcast_to(np.asarray(values, dtype=declaration(name).dtype), (n, *np.shape(values))).copy()
        for name, values in given.items()
    }


def write_study(
    folder: Path,
    n_images: int = 200,
    *,
    classifier: bool = True,
    n_heads: tuple[int, ...] | None = None,
    windows: bool = False,
) -> Path:
    """The planted study in `folder / "study"`, its photographs beside it in class folders.

    Without `classifier` it is that of a model that gives features. `n_heads` by layer, at most `N_HEADS`: the heads
    that a layer lacks are padding. With `windows` it is that of a WinT.
    """
    photos = folder / "photos"
    for name in CLASSES:
        (photos / name).mkdir(parents=True, exist_ok=True)
    for image in range(n_images):
        label = image % len(CLASSES)
        photograph(image, label).save(photos / CLASSES[label] / f"{image:04d}.png")
    manifest = scan(open_images(str(photos), class_names=CLASSES))
    study = folder / "study"
    study.mkdir()
    changes = (
        {} if classifier else {"n_classes": None, "class_names": None, "left_out": {"head_flip": "no classifier."}}
    )
    counts = list(n_heads or [N_HEADS] * N_LAYERS)
    own = set(windows_of(1)) if windows else set()
    planted = own | measures().keys() & _part(Part(0, 0, 1), np.zeros(1, int), manifest.images).keys()
    changes["measures"] = {name: declaration(name).version for name in measures() if name in planted}
    if not classifier:
        changes["measures"] = {
            name: version
            for name, version in changes["measures"].items()
            if "classifier" not in declaration(name).needs
        }
    writing = StudyFolder(study, plan_of(n_images, manifest.digest, n_heads=counts, **changes), manifest)
    labels = np.array([entry.label for entry in manifest.images])
    rng = np.random.default_rng(0)
    for part in writing.missing:
        arrays = _part(part, labels, manifest.images) | (windows_of(part.stop - part.start) if windows else {})
        if not classifier:
            arrays = {name: values for name, values in arrays.items() if "classifier" not in declaration(name).needs}
            arrays["label"] = np.full_like(arrays["label"], -1)
        for layer, count in enumerate(counts):
            for name, values in arrays.items():
                if "head" in declaration(name).dims:
                    values[:, layer, count:] = np.nan if values.dtype.kind == "f" else 0
        writing.write_part(part, arrays)
    angle = 2 * np.pi * labels / len(CLASSES)
    xy = np.stack([np.cos(angle), np.sin(angle)], 1) * 12 + rng.normal(0, 2.6, (n_images, 2))
    if classifier:
        writing.write_derived({"image_xy": xy.astype(np.float32)})
    return study


def write_beside(study: Path, folder: Path, model: str = "planted:another") -> Path:
    """A study of the same images through another model: it looks half a patch further, most in its last layer."""
    data = open_study(study)
    manifest = read_manifest(study)
    plan = replace(read_plan(study), model=model, weight_digest="1" * 64)
    folder.mkdir()
    writing = StudyFolder(folder, plan, manifest)
    names = [str(name) for name in data.data_vars if "image" in data[name].dims and name != "image_xy"]
    further = np.linspace(0.2, 0.8, data.sizes["layer"])[:, None]
    rng = np.random.default_rng(5)
    for part in writing.missing:
        arrays = {name: data[name].values[part.start : part.stop] for name in names}
        noise = rng.normal(0, 0.05, arrays["attention_distance"].shape)
        arrays["attention_distance"] = (arrays["attention_distance"] + further + noise).astype(np.float32)
        writing.write_part(part, arrays)
    writing.write_derived({"image_xy": data["image_xy"].values})
    return folder


def _part(part: Part, labels: np.ndarray, entries: tuple) -> dict[str, np.ndarray]:
    chosen = labels[part.start : part.stop]
    measured = measures_of(chosen, part.start)
    small = [
        Image.open(entry.path).convert("RGB").crop((10, 0, SIZE + 10, SIZE))
        for entry in entries[part.start : part.stop]
    ]
    best = np.argsort(np.arange(len(CLASSES)) != measured["prediction"][:, None], axis=1, kind="stable")[:, :5]
    odds = np.array([0.86, 0.08, 0.03, 0.02, 0.01], dtype=np.float32)
    return {
        **measured,
        "thumbnail": np.stack([np.asarray(each.resize((THUMBNAIL_PX, THUMBNAIL_PX))) for each in small]),
        "top_class": best.astype(np.int32),
        "top_probability": np.broadcast_to(odds, best.shape).copy(),
    }


DECLARED = tuple(measures_of(np.array([0]), 0))


class AnalysisParts(NamedTuple):
    """As `vitrail.live.AnalysisParts`, which cannot be imported without torch."""

    names: tuple[tuple[str, ...], ...]
    left_out: Mapping[str, str]


class PlantedLive:
    """A stand-in for the model that honours the protocol of `docs/architecture.md`: its numbers follow from the planted
    reach and from the photograph's own brightness, so that a test can predict them."""

    identity = ModelIdentity("0" * 64)

    def attention(self, image: Image.Image, layer: int) -> np.ndarray:
        place = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID), indexing="ij"), -1).reshape(-1, 2)
        hops = np.abs(place[:, None] - place[None]).max(-1)
        grey = np.asarray(image.convert("L").resize((GRID, GRID)), dtype=np.float64).reshape(-1) / 255
        maps = []
        for head in range(N_HEADS):
            weights = np.full((1 + GRID**2, 1 + GRID**2), 0.05)
            weights[1:, 1:] = np.exp(-hops / reach(layer, head)) * (0.2 + grey) + 1e-4
            weights[0, 1:] = grey**2 + 0.01
            maps.append(weights / weights.sum(axis=1, keepdims=True))
        return np.stack(maps).astype(np.float32)

    def head_maps(self, image: Image.Image) -> np.ndarray:
        return np.stack([self.attention(image, layer)[:, 0, 1:] for layer in range(N_LAYERS)])

    def modes(self, image: Image.Image, layer: int, head: int) -> np.ndarray:
        plain = np.full(len(CLASSES), 0.02)
        plain[int(np.asarray(image).sum()) % len(CLASSES)] = 0.9
        flat = np.full(len(CLASSES), 1 / len(CLASSES))
        harm = np.array([0, 0.8, 0.3, 0.6, 0.2, 0.1]) * (layer + head + 1) / (N_LAYERS + N_HEADS)
        return np.stack([plain * (1 - part) + flat * part for part in harm]).astype(np.float32)

    def parts(self, analysis: str) -> AnalysisParts:
        names = tuple(name for name in analyses()[analysis].measure_names if name in DECLARED)
        if analysis == "base":
            return AnalysisParts((names,), {})
        looked = ("class_attention", "token_similarity")
        own = tuple(each.name for each in analyses()[analysis].image_measures if each.name in looked)
        left_out = {} if analysis != "tokens" else {"grouping_purity": "it needs objects."}
        return AnalysisParts(tuple(part for part in (names, own) if part), left_out)

    def look_part(
        self,
        image: Image.Image,
        analysis: str,
        part: Sequence[str],
        patch: int | None = None,
        channel: int | None = None,
    ) -> xr.Dataset:
        measured = self.planted(image)
        arrays = {name: measured[name][None] for name in part if name in measured}
        if "class_attention" in part:
            maps = np.stack([self.attention(image, layer)[:, 0] for layer in range(N_LAYERS)])
            arrays["class_attention"] = maps
        if "token_similarity" in part:
            arrays["token_similarity"] = np.full((N_LAYERS, GRID**2), -1 if patch is None else patch, np.float32)
        variables = {
            name: xr.DataArray(values, dims=declaration(name).dims, attrs=declaration(name).attributes())
            for name, values in arrays.items()
        }
        return xr.Dataset(variables, attrs={"left_out": {name: "planted." for name in part if name not in arrays}})

    def what_if(self, image: Image.Image, **changes: object) -> xr.Dataset:
        steps = 1 + len(changes.get("heads_off", ()))  # type: ignore[arg-type]
        odds = np.array([0.86, 0.08, 0.03, 0.02, 0.01])
        left = np.linspace(1, 0.5, steps)
        return xr.Dataset(
            {
                "top_class": (("step", "class"), np.tile(np.arange(5), (steps, 1))),
                "top_probability": (("step", "class"), odds * left[:, None]),
                "followed_probability": (("step", "rank"), odds * left[:, None]),
                "probability": ("step", odds[0] * left),
                "divergence": ("step", 1 - left),
                "token_drift": (("step", "layer", "token"), np.full((steps, N_LAYERS, 1 + GRID**2), 0.1)),
            },
            coords={"step": [f"step {step}" for step in range(steps)], "rank": np.arange(5)},
            attrs={"left_out": {}, "use_this": "vitrail prune STUDY"},
        )

    def planted(self, image: Image.Image) -> dict[str, np.ndarray]:
        measured = measures_of(np.array([0]), int(np.asarray(image, dtype=np.int64).sum()) % 10_000)
        return {name: values[0] for name, values in measured.items()}
