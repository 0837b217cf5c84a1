"""Arrays, tables and image folders from the user's own files."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lvppl.data.csv_file import parse_csv
from lvppl.data.image_folder import read_image_folder
from lvppl.data.pixels import float_dtype
from lvppl.errors import ProgramError

__all__ = ["Loaded", "load"]


@dataclass(frozen=True, eq=False)
class Loaded:
    """What a file held.

    :ivar Tensor values: (data, ...).
    :ivar tuple columns: names of the columns of a ``.csv``; empty otherwise.
    :ivar tuple files: names of the files of an image folder, one a datum; empty otherwise.
    :ivar pathlib.Path path: where it was read from.
    """

    values: Tensor
    columns: tuple[str, ...]
    files: tuple[str, ...]
    path: Path

    def __len__(self) -> int:
        """Number of data."""
        return len(self.values)


def load(
    path: str | Path,
    *,
    array: str | None = None,
    columns: Sequence[str] | None = None,
    header: bool | None = None,
    delimiter: str = ",",
    allow_missing: bool = False,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Read an array (``.npy``, ``.npz``), a table (``.csv``) or a folder of ``.png`` and ``.jpg``.

    The first dimension is the data. Floating and boolean arrays, tables and images become
    ``dtype``; arrays of integers become int64, or ``dtype`` where one is given. Images are
    intensities in [0, 1], (data, height, width) or (data, 3, height, width), in the order of their
    names.

    :param path: a file, or a folder of images of one size.
    :param str array: which array of an ``.npz``; needed where it holds several.
    :param columns: names of the columns of a ``.csv`` to take; all for ``None``.
    :param bool header: whether the first line of a ``.csv`` holds names; found out for ``None``.
    :param str delimiter: what separates the cells of a ``.csv``.
    :param bool allow_missing: let NaN through as the mark of a missing value. Infinity never is.
    :param torch.dtype dtype: a floating dtype; torch's default for ``None``.
    :raises ProgramError: on a file that is not there, of another kind or damaged; on an option that
        its kind does not have; on cells that are not numbers, images of different sizes, and NaN
        or infinite values: each named by file, row and column.
    """
    path = Path(path)
    kind = _kind(path)
    _refuse_foreign_options(path, kind, array=array, columns=columns, header=header)
    names: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    if kind == "folder":
        values, files = read_image_folder(path)
    elif kind == ".csv":
        text = _read_text(path)
        values, names = parse_csv(
            text, path.name, columns=columns, header=header, delimiter=delimiter
        )
    else:
        values = _read_array(path, array)
    _require_finite(values, names, path.name, allow_missing)
    return Loaded(_as_tensor(values, dtype, path.name), names, files, path)


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise ProgramError(f"{path} is not there: expected a file, or a folder of images.")
    kind = path.suffix.lower()
    if kind not in (".npy", ".npz", ".csv"):
        raise ProgramError(
            f"{path.name} is of kind {kind or 'without a suffix'}: expected .npy, .npz, .csv, or a "
            "folder of .png and .jpg images."
        )
    return kind


def _refuse_foreign_options(path: Path, kind: str, **options: object) -> None:
    """An option that would be ignored is a misunderstanding."""
    belongs = {"array": ".npz", "columns": ".csv", "header": ".csv"}
    for name, value in options.items():
        if value is not None and kind != belongs[name]:
            raise ProgramError(
                f"{name}= is for {belongs[name]} files, but {path.name} is a {kind}: leave it out."
            )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProgramError(
            f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start}): save it so."
        ) from error


def _read_array(path: Path, name: str | None) -> np.ndarray:
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return content[_choose(tuple(content.files), name, path.name)]
    except ProgramError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ProgramError(
            f"{path.name} cannot be read as an array of numbers: {error}. Arrays of Python objects "
            "are not read: save numbers with numpy.save or numpy.savez."
        ) from error


def _choose(held: tuple[str, ...], name: str | None, source: str) -> str:
    listed = ", ".join(held) or "nothing"
    if name is None and len(held) == 1:
        return held[0]
    if name is None:
        raise ProgramError(f"{source} holds {listed}: say which with array=.")
    if name not in held:
        raise ProgramError(f"{source} holds no array {name!r}: it holds {listed}.")
    return name


def _require_finite(
    values: np.ndarray, names: tuple[str, ...], source: str, allow_missing: bool
) -> None:
    if values.dtype.kind != "f":
        return
    bad = np.isinf(values) if allow_missing else ~np.isfinite(values)
    if not bad.any():
        return
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    missing = bool(np.isnan(values[first]))
    what = "NaN (missing)" if missing else f"{values[first]}"
    remedy = "fill it in, drop the row, or pass allow_missing=True" if missing else "mend the file"
    more = f", and {bad.sum() - 1} more" if bad.sum() > 1 else ""
    raise ProgramError(f"{source}: {what} at {_place(first, names)}{more}: {remedy}.")


def _place(index: tuple[int, ...], names: tuple[str, ...]) -> str:
    """Row and column, counted from 1 in a table, and as indices from 0 in any other array."""
    if names:
        return f"row {index[0] + 1}, column {names[index[1]]!r}"
    if len(index) == 2:
        return f"row {index[0] + 1}, column {index[1] + 1}"
    return f"index {list(index)}"


def _as_tensor(values: np.ndarray, dtype: torch.dtype | None, source: str) -> Tensor:
    if values.ndim == 0:
        raise ProgramError(f"{source} holds one number without a data dimension: store an array.")
    if values.size == 0:
        raise ProgramError(f"{source} holds no data: its shape is {values.shape}.")
    kind = values.dtype.kind
    if kind not in "fiub":
        raise ProgramError(
            f"{source} holds {values.dtype} values: expected real numbers, integers or booleans."
        )
    if kind in "iu":
        if values.max() > np.iinfo(np.int64).max:
            raise ProgramError(f"{source} holds {values.max()}, which is too large for int64.")
        integers = torch.from_numpy(values.astype(np.int64))
        return integers if dtype is None else integers.to(float_dtype(dtype))
    wanted = float_dtype(dtype)
    # By way of float64, and in the machine's byte order, whatever the file's was.
    tensor = torch.from_numpy(values.astype(np.float64)).to(wanted)
    if bool(torch.isinf(tensor).any()):
        largest = np.nanmax(np.abs(values.astype(np.float64)))
        raise ProgramError(
            f"{source} holds values up to {largest}, too large for {wanted}: rescale them, or pass "
            "dtype=torch.float64."
        )
    return tensor
