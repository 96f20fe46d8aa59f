"""Studies to draw: planted values with the attributes that the store writes."""

import numpy as np
import xarray as xr

from synthetic_study import measures_of
from vitrail.analysis import analyses, declaration


def planted(n_images=6, n_layers=4, n_heads=3, n_hops=5, fewer=(), only=None):
    """A study as `open_study` gives it; layers named in `fewer` lack their last head, padded as the store pads."""
    arrays = measures_of(np.arange(n_images) % 3, 0, n_layers, n_heads, n_hops)
    heads_of = [n_heads - (layer in fewer) for layer in range(n_layers)]
    kept = {}
    for name in only or arrays:
        values, measure = arrays[name].copy(), declaration(name)
        if measure.dims[:3] == ("image", "layer", "head"):
            for layer in fewer:
                values[:, layer, -1] = False if values.dtype == bool else np.nan
        kept[name] = xr.DataArray(values, dims=measure.dims, attrs=measure.attributes())
    attrs = {
        "model": "planted:vit", "n_heads": heads_of, "grids": [[n_hops, n_hops]] * n_layers,
        "prefixes": [1] * n_layers, "class_token": True, "class_names": None,
    }  # fmt: skip
    ids = np.array([f"folder/{image}.png" for image in range(n_images)])
    return xr.Dataset(kept, coords={"image": ids}, attrs=attrs)


GRID_SIDE = 4
SIZES = {
    "image": 6, "layer": 3, "head": 2, "token": 17, "patch": 16, "hop": 4, "xy": 2, "side": 4, "amount": 3, "cells": 2,
    "mode": 2, "rule": 10, "cluster": 2, "cls_cluster": 2, "query": 16, "key": 16, "cell": 16, "class": 5, "row": 8,
    "column": 8, "channel": 3, "token_channel": 12, "feature": 12,
}  # fmt: skip
FROM_ZERO_TO = {"pattern_patch_cluster": 2, "pattern_cls_cluster": 2, "predicted_window": 3, "thumbnail": 256}
"""Integers end below this number; those that are not named here are classes."""


def study_of_everything(n_images=SIZES["image"]):
    """A study that holds every measure that Vitrail declares, from a model of 3 layers and 4 x 4 patches."""
    rng = np.random.default_rng(0)
    sizes = SIZES | {"image": n_images}
    arrays = {}
    for analysis in analyses().values():
        for measure in (*analysis.measures, *analysis.accompanying):
            shape = tuple(sizes[dim] for dim in measure.dims)
            values = rng.random(shape)
            if np.dtype(measure.dtype).kind in "iu":
                values = rng.integers(0, FROM_ZERO_TO.get(measure.name, 5), shape)
            elif measure.dtype == "bool":
                values = values < 0.2
            arrays[measure.name] = (measure.dims, values.astype(measure.dtype), measure.attributes())
    n_layers = sizes["layer"]
    attrs = {
        "model": "planted:everything", "n_heads": [sizes["head"]] * n_layers,
        "grids": [[GRID_SIDE, GRID_SIDE]] * n_layers, "prefixes": [1] * n_layers, "class_token": True,
        "class_names": None, "left_out": {}, "options": {}, "patterns": {"grid": [GRID_SIDE, GRID_SIDE]},
    }  # fmt: skip
    return xr.Dataset(arrays, coords={"image": [f"{image}.png" for image in range(n_images)]}, attrs=attrs)
