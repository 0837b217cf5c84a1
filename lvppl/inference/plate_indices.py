"""The indices of whole plates, made once: at each run of a program they are 0, ..., size - 1."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["PlateIndices"]


class PlateIndices(Messenger):
    """Gives plates that are not subsampled the indices that they had in an earlier run.

    With a million rows a new range costs as much as the rest of a program.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if type(fn).__name__ != "_Subsample" or msg["value"] is not None or fn.use_cuda:
            return
        if fn.subsample_size is not None and fn.subsample_size < fn.size:
            return
        key = fn.size, str(fn.device)
        if key not in self._known:
            self._known[key] = torch.arange(fn.size, device=fn.device)
        msg["value"] = self._known[key]
        msg["done"] = True
