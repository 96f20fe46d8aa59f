"""The set of figures is that of the rooms a study has."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from vitrail.errors import UsageError
from vitrail.figures.whole import draw_figure, draw_figures


def study(**arrays: tuple[tuple[str, ...], tuple[int, ...]]) -> xr.Dataset:
    generator = np.random.default_rng(0)
    attributes = {"title": "a", "unit": "1", "low": "l", "high": "h", "source": "s", "limits": "m"}
    data = {
        name: xr.DataArray(generator.random(shape).astype(np.float32), dims=dims, attrs=attributes)
        for name, (dims, shape) in arrays.items()
    }
    return xr.Dataset(data, coords={"image": [f"i{index}" for index in range(4)]}, attrs={"model": "m"})


def test_a_study_with_nothing_to_draw_has_no_figures_and_is_no_error(tmp_path: Path) -> None:
    assert draw_figures(study(field_size=(("image", "layer", "patch"), (4, 2, 9))), tmp_path) == []


def test_grouping_is_drawn_without_heads(tmp_path: Path) -> None:
    made = draw_figures(study(grouping_silhouette=(("image", "layer"), (4, 3))), tmp_path, ("png", "svg"))
    assert [path.name for path in made] == ["grouping_by_layer.png", "grouping_by_layer.svg"]
    assert all(path.stat().st_size > 1000 for path in made)


def test_every_room_of_a_study_is_drawn(tmp_path: Path) -> None:
    per_patch = (4, 2, 9)
    held = study(
        window=(("image", "layer", "patch", "side"), (*per_patch, 4)),
        tendency=(("image", "layer", "patch", "xy"), (*per_patch, 2)),
        hub=(("image", "layer", "patch"), per_patch),
        token_norm=(("image", "layer", "token"), (4, 2, 10)),
        probability=(("image",), (4,)),
        occlusion_random=(("image", "amount"), (4, 3)),
    ).assign_attrs(grids=[[3, 3]] * 2, prefixes=[1, 1], class_token=True)
    names = [path.stem for path in draw_figures(held, tmp_path, ("svg",))]
    assert names == ["window_coverage", "tendency_flow", "hub_map", "norms_by_layer", "survival"]


def test_an_unknown_format_is_refused_even_where_nothing_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bmp"):
        draw_figures(study(), tmp_path, ("bmp",))


def test_one_figure_is_drawn_by_its_name_or_refused_with_what_there_is() -> None:
    norms = study(token_norm=(("image", "layer", "token"), (4, 2, 10)), probability=(("image",), (4,)))
    norms = norms.assign_attrs(grids=[[3, 3]] * 2, prefixes=[1, 1], class_token=True)
    drawn = draw_figure(norms, "norms_by_layer")
    assert len(drawn.axes) > 0
    with pytest.raises(UsageError, match="there are overview, "):
        draw_figure(norms, "nothing")
    with pytest.raises(UsageError, match="--measures patches"):
        draw_figure(norms, "hub_map")
    with pytest.raises(UsageError, match="these numbers have none any more"):
        draw_figure(norms.isel(image=0), "norms_by_layer")
    with pytest.raises(UsageError, match="no figure 'norms_by_layer' of one image"):
        draw_figure(norms, "norms_by_layer", one_image=True)
