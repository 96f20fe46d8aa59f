"""The set of figures is that of the rooms a study has."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from vitrail.errors import UsageError
from vitrail.figures.whole import figures_of


def study(**arrays: tuple[tuple[str, ...], tuple[int, ...]]) -> xr.Dataset:
    generator = np.random.default_rng(0)
    attributes = {"title": "a", "unit": "1", "low": "l", "high": "h", "source": "s", "limits": "m"}
    data = {
        name: xr.DataArray(generator.random(shape).astype(np.float32), dims=dims, attrs=attributes)
        for name, (dims, shape) in arrays.items()
    }
    return xr.Dataset(data, coords={"image": [f"i{index}" for index in range(4)]}, attrs={"model": "m"})


def test_a_study_of_patches_alone_has_no_figures_and_is_no_error(tmp_path: Path) -> None:
    assert figures_of(study(field_size=(("image", "layer", "patch"), (4, 2, 9))), tmp_path) == []


def test_grouping_is_drawn_without_heads(tmp_path: Path) -> None:
    made = figures_of(study(grouping_silhouette=(("image", "layer"), (4, 3))), tmp_path, ("png", "svg"))
    assert [path.name for path in made] == ["grouping_by_layer.png", "grouping_by_layer.svg"]
    assert all(path.stat().st_size > 1000 for path in made)


def test_an_unknown_format_is_refused_even_where_nothing_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bmp"):
        figures_of(study(), tmp_path, ("bmp",))
