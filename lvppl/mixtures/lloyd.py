"""Hard assignments under one common scale: Lloyd's algorithm, k-means.

With a common scale s the squares of y cancel: the component chosen has the largest

    score_nk = y_n mu_k - |mu_k|^2 / 2 + s^2 (ln w_k - max ln w)

where y and mu are less a shift near the mean. Scores are computed in the dtype of the data, so
that rounding may settle what is all but a tie; sums are in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.mixtures import native
from lvppl.mixtures.chunks import rows_at_once

__all__ = ["Centres", "first_max"]

_TILE = 2**15  # scores of one product: what a first-level cache and a BLAS like
_WIDEST_TILE = 64  # columns of a compiled tile that a first-level cache holds
_MARK = 2.0**20  # in float32, the sum of two of these and of any indices below it is exact


@dataclass(frozen=True)
class Centres:
    """K centres, float64, less the shift.

    Attributes:
        loc: (K, D).
        preference: s^2 (ln w_k - max ln w), (K,); zero where weights are equal.
        shift: (D,), a number of the dtype of the data.
    """

    loc: Tensor
    preference: Tensor
    shift: Tensor

    @property
    def bias(self) -> Tensor:
        """What a score is at y = 0, (K,)."""
        return self.preference - 0.5 * self.loc.square().sum(-1)

    def sums(self, y: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
        """Sums of y less the shift by the component that is chosen, (K, D), and counts, (K,)."""
        if y.shape[1] <= _WIDEST_TILE and native.takes(y, self.loc.numel()):
            given = [part.to(y.dtype) for part in (self.shift, self.loc, self.bias)]
            return native.kmeans_sums(y, *given)
        total, counts = torch.zeros_like(self.loc), torch.zeros_like(self.preference)
        part = y.new_empty(self.loc.shape)
        for _, data, scores in self.scores(y, chunk):
            label = first_max(scores)[0].flatten()
            total += part.zero_().index_add_(0, label, data)
            counts.index_add_(0, label, counts.new_ones(()).expand(len(label)))
        return total, counts

    def residuals(self, y: Tensor, chunk: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Counts (K,), sums of y - mu (K, D) and of its squared norm (K,).

        The residuals themselves are summed, in float64: nothing cancels.
        """
        counts, second = torch.zeros_like(self.preference), torch.zeros_like(self.preference)
        first, loc = torch.zeros_like(self.loc), self.loc + self.shift
        for rows, _, scores in self.scores(y, chunk):
            label = first_max(scores)[0].flatten()
            residual = y[rows] - loc[label]
            counts.index_add_(0, label, counts.new_ones(()).expand(len(label)))
            first.index_add_(0, label, residual)
            second.index_add_(0, label, residual.square().sum(1))
        return counts, first, second

    def scores(self, y: Tensor, chunk: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices, their data less the shift (n, D), and scores (tiles, K, n / tiles)."""
        count, dim = self.loc.shape
        bias, slope = self.bias.to(y.dtype)[:, None], self.loc.to(y.dtype)
        shift = self.shift.to(y.dtype)
        size = rows_at_once(y, y.element_size() * (count + 2 * dim), chunk)
        tile = min(max(_TILE // count, 32), size) if y.device.type == "cpu" else size
        data, scores = y.new_empty(size, dim), y.new_empty(size * count)
        for rows in _whole_tiles(len(y), size, tile):
            n = rows.stop - rows.start
            part, shape = torch.sub(y[rows], shift, out=data[:n]), (max(n // tile, 1), count, -1)
            columns = part.view(shape[0], -1, dim).mT
            out = scores[: n * count].view(shape)
            torch.baddbmm(bias, slope.expand(shape[0], -1, -1), columns, out=out)
            yield rows, part, out


def _whole_tiles(count: int, size: int, tile: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``range(count)``: whole tiles, or less than one."""
    start = 0
    while start < count:
        n = min(size, count - start)
        n = n - n % tile if n > tile else n
        yield slice(start, start + n)
        start += n


def first_max(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the largest of K scores, the first of equals, and its value.

    On a processor argmax is slow; the index of the only entry equal to the largest is a product.

    Args:
        scores: shape (*batch, K, n); overwritten.

    Returns:
        Index, int64, and value, both of shape (*batch, n).
    """
    largest = scores.amax(-2)
    if scores.device.type != "cpu":
        return scores.argmax(-2), largest
    chosen = torch.eq(scores, largest[..., None, :], out=scores)
    mark = torch.arange(_MARK, _MARK + scores.shape[-2], dtype=scores.dtype)
    index = torch.matmul(mark, chosen)
    low, high = index.aminmax()
    label = (index - _MARK).long()
    if low < _MARK or high >= 2 * _MARK:  # none is equal to NaN; several tie
        tied = (index < _MARK) | (index >= 2 * _MARK)
        label[tied] = chosen.mT[tied].argmax(-1)
    return label, largest
