"""All arrays of a study in one netCDF-4 file, by the CF conventions where they apply."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitrail.exports.source import ExportSource, import_library

__all__ = ["FILE", "write_netcdf"]

FILE = "study.nc"


def write_netcdf(source: ExportSource, folder: Path) -> str:
    """Writes the arrays with their dimensions, coordinates and attributes; the plan is JSON in the attribute `plan`.

    Args:
        source: The study.
        folder: A folder without files of these names.

    Returns:
        A line that opens the file, with `{folder}` in it.

    Raises:
        MissingLibrary: h5netcdf is not installed.
    """
    h5netcdf = import_library("h5netcdf", "netcdf", "pip install 'vitrail[export]'")
    text = import_library("h5py", "netcdf", "pip install 'vitrail[export]'").string_dtype("utf-8")
    with h5netcdf.File(folder / FILE, "w") as file:
        file.attrs["Conventions"] = "CF-1.11"
        file.attrs["title"] = f"{source.plan.model}, {source.plan.n_images} images"
        file.attrs["plan"] = json.dumps(asdict(source.plan))
        file.dimensions = {str(name): size for name, size in source.data.sizes.items()}
        for name, coordinate in source.data.coords.items():
            values = coordinate.to_numpy()
            dtype = text if values.dtype.kind in "UO" else values.dtype
            file.create_variable(str(name), coordinate.dims, dtype=dtype)[...] = (
                values.astype(object) if dtype is text else values
            )
        for name, array in source.data.data_vars.items():
            _write_array(file, source, str(name), array)
    return f"xarray.open_dataset('{{folder}}/{FILE}', engine='h5netcdf')"


def _write_array(file: Any, source: ExportSource, name: str, array: xr.DataArray) -> None:
    is_bool = array.dtype.kind == "b"
    dtype = np.dtype(np.int8) if is_bool else array.dtype
    variable = file.create_variable(name, array.dims, dtype=dtype, compression="gzip", compression_opts=1)
    if array.dims[:1] == ("image",):
        for rows, values in source.blocks([name]):
            variable[rows] = values[name].astype(dtype)
    else:
        variable[...] = array.to_numpy().astype(dtype)
    variable.attrs["long_name"] = str(array.attrs.get("title", name))
    if array.attrs.get("unit") == "1":
        variable.attrs["units"] = "1"  # the others, such as nats or patches, are none that CF knows
    if is_bool:
        variable.attrs["dtype"] = "bool"  # so xarray reads truth values
    for key, value in array.attrs.items():
        if isinstance(value, str | int | float):
            variable.attrs[str(key)] = value
