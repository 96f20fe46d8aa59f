"""Studies to draw: planted values with the attributes that the store writes."""

import numpy as np
import xarray as xr

from synthetic_study import measures_of
from vitrail.measure import MEASURES


def planted(n_images=6, n_layers=4, n_heads=3, n_hops=5, fewer=(), only=None):
    """A study as `open_study` gives it; layers named in `fewer` lack their last head, padded as the store pads."""
    arrays = measures_of(np.arange(n_images) % 3, 0, n_layers, n_heads, n_hops)
    heads_of = [n_heads - (layer in fewer) for layer in range(n_layers)]
    kept = {}
    for name in only or arrays:
        values, measure = arrays[name].copy(), MEASURES[name]
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
