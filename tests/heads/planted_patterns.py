"""Attention between patches with a known pattern: what each map is, and how much of it is noise, is planted."""

import numpy as np

GRID = (8, 8)
N_PATCHES = GRID[0] * GRID[1]
PLACES = np.stack(np.meshgrid(np.arange(GRID[0]), np.arange(GRID[1]), indexing="ij"), -1).reshape(-1, 2)
STEPS = PLACES[None] - PLACES[:, None]
"""[query key (down, across)]"""


def normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(-1, keepdims=True)


def identity() -> np.ndarray:
    return np.eye(N_PATCHES)


def shift(across: int, down: int) -> np.ndarray:
    """To the patch that many steps away; patches at the border, which have none, look everywhere."""
    hit = ((STEPS[..., 0] == down) & (STEPS[..., 1] == across)).astype(float)
    return normalised(np.where(hit.any(-1, keepdims=True), hit, 1.0))


def row_band() -> np.ndarray:
    return normalised((STEPS[..., 0] == 0).astype(float))


def column_band() -> np.ndarray:
    return normalised((STEPS[..., 1] == 0).astype(float))


def local(width: float = 1.0) -> np.ndarray:
    return normalised(np.exp(-(STEPS**2).sum(-1) / (2 * width**2)))


def sink(*keys: int) -> np.ndarray:
    hit = np.zeros(N_PATCHES)
    hit[list(keys)] = 1.0
    return normalised(np.broadcast_to(hit, (N_PATCHES, N_PATCHES)))


def uniform() -> np.ndarray:
    return np.full((N_PATCHES, N_PATCHES), 1 / N_PATCHES)


FAMILIES = {
    "self": identity(),
    "shift (+1, 0)": shift(1, 0),
    "shift (-1, 0)": shift(-1, 0),
    "shift (0, +1)": shift(0, 1),
    "shift (-2, -1)": shift(-2, -1),
    "row band": row_band(),
    "column band": column_band(),
    "local": local(),
    "sink": sink(3, 17, 22, 40, 61),
    "uniform": uniform(),
}
"""By the label that the rules should give."""


def with_noise(pattern: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """A map that is the pattern but for a share of even attention, and uneven by a factor of lognormal noise."""
    mixed = (1 - share) * pattern + share / N_PATCHES
    return normalised(mixed * np.exp(0.3 * rng.normal(size=mixed.shape)))


def planted(n_each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Maps [map query key] of every family in turn, and which family each is."""
    rng = np.random.default_rng(seed)
    label = np.tile(np.arange(len(FAMILIES)), n_each)
    patterns = list(FAMILIES.values())
    maps = [with_noise(patterns[at], rng, rng.uniform(0.05, 0.25)) for at in label]
    return np.stack(maps).astype(np.float32), label


def many_patterns(n_maps: int, seed: int = 0) -> np.ndarray:
    """Shifts by every step within reach and sinks anywhere, each with noise: more patterns than components."""
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(n_maps):
        across, down = rng.integers(-6, 7, 2)
        pattern = (
            shift(int(across), int(down)) if rng.random() < 0.8 else sink(*rng.choice(N_PATCHES, 2, replace=False))
        )
        maps.append(with_noise(pattern, rng, rng.uniform(0.05, 0.25)))
    return np.stack(maps).astype(np.float32)
