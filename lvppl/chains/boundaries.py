"""What blocks start from, such that they agree with their neighbours: a guess, or products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvppl.chains.sweep import Sweep


def run_from_guess(sweep: Sweep, tolerance: float) -> bool:
    """Sweep from a flat guess; whether every block then starts from what its neighbours end with.

    All messages are then those of a single pass, to rounding times the number of blocks. A chain
    forgets its past, most often within a block: so a sweep from a guess gives the next its starts.
    """
    sweep.buffers.starts.fill_(1.0)
    sweep.run()
    if sweep.layout.N == 1:
        return True
    error = _run_between(sweep, sweep.buffers.ends)
    if tolerance < error <= math.sqrt(tolerance):  # beyond it another sweep would not be enough
        error = _run_between(sweep, sweep.buffers.ends)
    return error <= tolerance


def run_from_products(sweep: Sweep, A: Tensor, tolerance: float) -> bool:
    """The same from starts that products of matrices give, for chains that do not forget.

    Args:
        A: the transition of all columns at all steps, (K, K).
    """
    if sweep.ended is not None and not sweep.has_run:  # what is known of blocks with an end inside
        sweep.buffers.starts.fill_(1.0)
        sweep.run()
    return _run_between(sweep, _product_ends(sweep, A)) <= tolerance


def _run_between(sweep: Sweep, ends: Tensor) -> float:
    """Sweep from what follows from these ends; how inconsistent the outcome is."""
    sweep.buffers.starts.copy_(_neighbours(sweep, ends))
    sweep.run()
    return _inconsistency(sweep)


def _neighbours(sweep: Sweep, ends: Tensor) -> Tensor:
    """The starts that follow from what the neighbouring blocks end with, (2, K, R)."""
    B, departing = sweep.layout.B, sweep.steps.depart(ends)
    starts = torch.ones_like(departing)
    starts[0, :, B:] = departing[0, :, :-B]
    starts[1, :, :-B] = departing[1, :, B:]
    return starts


def _inconsistency(sweep: Sweep) -> float:
    """The largest relative difference between the starts and what they should have been."""
    used, found = sweep.buffers.starts, _neighbours(sweep, sweep.buffers.ends)
    largest = torch.maximum(used, found)
    difference = (used - found).abs() / torch.where(largest > 0, largest, 1.0)
    # an impossible sequence ends with zeros; a start at or below the first of them is not used
    return float(difference.max())


def _product_ends(sweep: Sweep, A: Tensor) -> Tensor:
    """What the blocks end with, from the product of the matrices of each block, (2, K, R)."""
    N, B, K = sweep.layout.N, sweep.layout.B, sweep.layout.K
    Q = _block_products(sweep, A).unflatten(-1, (N, B)).permute(2, 3, 1, 0)  # (N, B, from, to)
    forward, backward = A @ Q, Q @ A
    # the first and the last start from ones, with no transition before or after them
    forward[0], backward[-1] = Q[0], Q[-1]
    if sweep.ended is not None:
        # where β was set within a block, its end is known, whatever comes in
        known = sweep.ended.any(0).reshape(N, B, 1, 1)
        ends = sweep.buffers.ends[1].reshape(K, N, B, 1).permute(1, 2, 0, 3)
        backward = torch.where(known, ends, backward)
    matrices = torch.stack([forward, backward.flip(0).transpose(-2, -1)], 1)
    ends = _running_products(matrices)
    return torch.stack([ends[:, 0], ends[:, 1].flip(0)]).permute(0, 3, 1, 2).reshape(2, K, -1)


def _block_products(sweep: Sweep, A: Tensor) -> Tensor:
    """b_1 A b_2 … A b_L of each block, up to a factor for each, (to, from, R)."""
    layout, buffers = sweep.layout, sweep.buffers
    K, R, tiny = layout.K, layout.R, torch.finfo(A.dtype).tiny
    b = buffers.factors[: layout.L]
    product = torch.eye(K, dtype=A.dtype, device=A.device)[:, :, None] * b[0][:, None]
    spare, events, transposed = torch.empty_like(product), set(buffers.events), A.T.contiguous()
    for s, factor in enumerate(b[:, :, None].unbind()):
        if s:
            torch.mm(transposed, product.view(K, K * R), out=spare.view(K, K * R))
            product, spare = spare.mul_(factor), product
        if s in events:
            product.div_(product.sum((0, 1), keepdim=True).clamp_min_(tiny))
    return product


def _running_products(matrices: Tensor) -> Tensor:
    """(1 … 1) M_0 M_1 … M_n for each n, normalised, (N, …, K), of (N, …, K, K)."""
    N, K = len(matrices), matrices.shape[-1]
    # about √N chunks of √N: products within all chunks at once, then vectors from chunk to chunk
    size = math.isqrt(N - 1) + 1
    identity = torch.eye(K, dtype=matrices.dtype, device=matrices.device)
    padding = identity.expand(-N % size, *matrices.shape[1:])
    chunks = torch.cat([matrices, padding]).unflatten(0, (-1, size))
    within = [chunks[:, 0]]
    for i in range(1, size):
        within.append(_normalised(within[-1] @ chunks[:, i], (-2, -1)))
    starts = [torch.ones_like(matrices[0, ..., :1, :])]
    for product in within[-1][:-1]:
        starts.append(_normalised(starts[-1] @ product, -1))
    ends = torch.stack(starts)[:, None] @ torch.stack(within, 1)
    return _normalised(ends.flatten(0, 1)[:N, ..., 0, :], -1)


def _normalised(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    return x / x.sum(dim, keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny)
