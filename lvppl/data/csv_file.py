"""Numbers from comma-separated text; what is no number is refused by column and row."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

import numpy as np

from lvppl.errors import ProgramError

__all__ = ["parse_csv"]

_MISSING = {"", "na", "nan", "n/a", "null", "none", "?"}


def parse_csv(
    text: str,
    source: str,
    *,
    columns: Sequence[str] | None = None,
    header: bool | None = None,
    delimiter: str = ",",
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values float64 (data, columns), NaN where a cell is missing, and the columns' names.

    Missing is an empty cell, or one of ``NA``, ``N/A``, ``NaN``, ``null``, ``none``, ``?`` in any
    case. Rows are counted from 1, without the header; lines as in the file.

    :param str source: the file's name, for messages.
    :param columns: names of the columns to take, in order; all for ``None``.
    :param bool header: whether the first line holds names; ``None``: it does when none of its cells
        is a number. Without a header the columns are named ``"0"``, ``"1"``, ...
    :raises ProgramError: on a cell that is no number, a row of another length, an unknown or
        doubled name, or no rows at all.
    """
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if not lines:
        raise ProgramError(f"{source} is empty: expected rows of numbers.")
    if header is None:
        header = not any(_is_number(cell) for cell in lines[0][1])
    if header:
        names = tuple(cell.strip() for cell in lines.pop(0)[1])
    else:
        names = tuple(str(i) for i in range(len(lines[0][1])))
    if not lines:
        raise ProgramError(f"{source} holds names ({', '.join(names)}) but no rows of numbers.")
    chosen = _positions(names, columns, source)
    values = np.empty((len(lines), len(chosen)))
    for row, (line, cells) in enumerate(lines):
        if len(cells) != len(names):
            raise ProgramError(
                f"{source}, row {row + 1} (line {line}) has {len(cells)} cells, but there are "
                f"{len(names)} columns: check the separator ({delimiter!r}) and the quotes."
            )
        for target, position in enumerate(chosen):
            where = f"{source}, column {names[position]!r}, row {row + 1} (line {line})"
            values[row, target] = _number(cells[position], where, first_row=not (header or row))
    return values, tuple(names[position] for position in chosen)


def _positions(names: tuple[str, ...], columns: Sequence[str] | None, source: str) -> list[int]:
    if columns is None:
        columns = names
    if isinstance(columns, str):
        raise ProgramError(f"columns must be a list of names, but is {columns!r}: [{columns!r}].")
    for name in columns:
        if names.count(name) != 1:
            count = "no column" if name not in names else "more than one column"
            raise ProgramError(f"{source} has {count} named {name!r}: it has {', '.join(names)}.")
    return [names.index(name) for name in columns]


def _is_number(cell: str) -> bool:
    try:
        _number(cell, "", first_row=False)
    except ProgramError:
        return False
    return cell.strip().lower() not in _MISSING


def _number(cell: str, where: str, *, first_row: bool) -> float:
    text = cell.strip()
    if text.lower() in _MISSING:
        return math.nan
    try:
        if "_" in text:  # Python reads "1_000" as 1000; a file that says so is not one of numbers
            raise ValueError
        return float(text)
    except ValueError:
        remedy = "name the columns of numbers with columns=[...]"
        if first_row:
            remedy = f"pass header=True if this is the line of names, or {remedy}"
        raise ProgramError(f"{where}: {cell!r} is not a number: {remedy}.") from None
