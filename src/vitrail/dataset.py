"""`MeasureDataset`: an `xarray.Dataset` whose attributes hold tables and lists, and that netCDF takes all the same."""

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from vitrail.errors import MissingLibrary

__all__ = ["MeasureDataset"]

_ENGINES = ("netCDF4", "h5netcdf")
"""Libraries with which xarray writes netCDF-4; without them it writes netCDF-3, which has no uint8 and no text."""


class MeasureDataset(xr.Dataset):  # type: ignore[no-untyped-call]  # xarray has no types there
    """A dataset of measures. Attributes such as the plan's tables are JSON in a netCDF file, which holds no tables."""

    __slots__ = ()

    def to_netcdf(self, *args: Any, **kwargs: Any) -> Any:
        """Writes the dataset as `xarray.Dataset.to_netcdf` does.

        Args:
            *args: As for `xarray.Dataset.to_netcdf`.
            **kwargs: As for `xarray.Dataset.to_netcdf`.

        Returns:
            What `xarray.Dataset.to_netcdf` returns.

        Raises:
            MissingLibrary: No library that writes netCDF-4 is installed, and no other engine was chosen.

        Example:
            >>> vitrail.open_study("study").to_netcdf("study.nc")  # doctest: +SKIP
        """
        if "engine" not in kwargs and not any(map(importlib.util.find_spec, _ENGINES)):
            raise MissingLibrary(
                "to_netcdf needs a library that writes netCDF-4, and none is installed. Install it: "
                "pip install 'vitrail[export]'"
            )
        plain = xr.Dataset(self.data_vars, self.coords, _as_text(self.attrs))
        for variable in plain.variables.values():
            variable.attrs = _as_text(variable.attrs)
        return plain.to_netcdf(*args, **kwargs)


def _as_text(attributes: Mapping[Any, Any]) -> dict[Any, Any]:
    """Texts, numbers and rows of numbers as they are, everything else as JSON."""
    return {
        name: value if _is_plain(value) else json.dumps(value, default=_in_python) for name, value in attributes.items()
    }


def _is_plain(value: Any) -> bool:
    is_row = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iuf"
    return isinstance(value, str | float | np.integer | np.floating) or type(value) is int or is_row


def _in_python(value: Any) -> Any:
    """What a number or array of NumPy inside of a table is in JSON."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"An attribute holds a {type(value).__name__}, which no file takes; write it as text.")
