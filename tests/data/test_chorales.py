"""The chorales: what the file says, note by note."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lvppl import data
from lvppl.data.verified import VerifiedFile
from lvppl.errors import ProgramError


def test_every_note_of_the_file_and_no_other(requires_data: Callable) -> None:
    path = requires_data("jsb-chorales-quarter.json")
    pieces = json.loads(path.read_text())
    parts = data.chorales(dtype=torch.float64)
    for name, count, steps in (("train", 229, 13_807), ("valid", 76, 4_602), ("test", 77, 4_725)):
        part = getattr(parts, name)
        assert (len(part), part.num_steps) == (count, steps)
        assert part.values.dtype == torch.float64 and part.values.shape[2] == 88
        found = [
            [(row.nonzero().flatten() + 21).tolist() for row in roll[:length]]
            for roll, length in zip(part.values, part.lengths.tolist(), strict=True)
        ]
        assert found == [[sorted(notes) for notes in piece] for piece in pieces[name]]
        assert not part.values[~part.exists].any()
        assert part.values[part.exists].shape == (steps, 88)


def test_a_file_that_is_not_compressed_is_verified_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = {"train": [[[21, 108], []], [[60]]], "valid": [[[]]], "test": [[[22]]]}
    content = json.dumps(pieces).encode()
    file = VerifiedFile("", "toy.json", hashlib.sha256(content).hexdigest(), [])
    monkeypatch.setattr(importlib.import_module("lvppl.data.chorales"), "_FILE", file)
    monkeypatch.setenv("LVPPL_DATA", str(tmp_path))
    (tmp_path / "toy.json").write_bytes(content)
    train = data.chorales().train
    assert train.lengths.tolist() == [2, 1] and train.values.shape == (2, 2, 88)
    assert train.values.nonzero().tolist() == [[0, 0, 0], [0, 0, 87], [1, 0, 39]]
    (tmp_path / "toy.json").write_bytes(content + b" ")
    with pytest.raises(ProgramError, match=r"toy\.json has the wrong digest"):
        data.chorales()


def test_a_dtype_that_is_not_floating_is_refused() -> None:
    with pytest.raises(ProgramError, match="must be a floating torch dtype"):
        data.chorales(dtype=torch.int64)
