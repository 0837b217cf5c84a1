r"""Log-densities by shorter ways than ``fn.log_prob``, where no gradient is wanted.

Bits with logits l are most of the work of an estimate of ln p(y): a pixel costs a logarithm and an
exponential, more than its share of the decoder's last matrix product. With t = l where the bit is 1
and -l where it is 0,

.. math:: \sum_v \ln p(y_v) = \sum_v \ln σ(t_v) = \ln \prod_v σ(t_v),

a sigmoid and a product for each, and a logarithm for every eight.

Normals pay a logarithm of the scale for every element of the particles, though the scale is often
the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Bernoulli, Independent, Normal
from torch import Tensor

__all__ = ["log_density"]

_TOGETHER = 8  # bits of a product: down to e^-87 in single precision, 11 nats each
_SLICE = 2**18  # bits at once on a processor: what a second-level cache holds
_WORTH = 2**16  # bits, below which the calls themselves are what takes time


def log_density(site: Any, fn: Any) -> Tensor:
    """``fn.log_prob`` at the value of a site, up to rounding."""
    if not torch.is_grad_enabled():
        for shorter in (_bits, _normals):
            short = shorter(fn, site["value"])
            if short is not None:
                return short
    result: Tensor = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    return result


def _bits(fn: Any, value: Any) -> Tensor | None:
    """ln p of vectors of independent bits; ``None`` where they are not, or it would underflow."""
    if type(fn) is not Independent or type(fn.base_dist) is not Bernoulli:
        return None
    logits, event_dim = fn.base_dist.__dict__.get("logits"), fn.reinterpreted_batch_ndims
    if logits is None or event_dim == 0 or logits.numel() < _WORTH:
        return None
    if not (isinstance(value, Tensor) and value.dtype == logits.dtype):
        return None
    if not bool(((value == 0) | (value == 1)).all()):
        return None
    sign = value.mul(2).sub_(1)
    if torch.broadcast_shapes(sign.shape, logits.shape) != logits.shape:
        return None
    found = [_log_sigmoid_sum(part * sign, event_dim) for part in _slices(logits, sign, event_dim)]
    known = [part for part in found if part is not None]
    if len(known) < len(found):
        return None
    return known[0] if len(known) == 1 else torch.cat(known)


def _normals(fn: Any, value: Any) -> Tensor | None:
    """ln p of vectors of independent Normals; ``None`` where they are not."""
    if type(fn) is not Independent or type(fn.base_dist) is not Normal:
        return None
    loc, scale, event_dim = fn.base_dist.loc, fn.base_dist.scale, fn.reinterpreted_batch_ndims
    if not (isinstance(value, Tensor) and value.dtype == loc.dtype == scale.dtype):
        return None
    if event_dim == 0 or value.numel() < _WORTH or value.shape != loc.shape:
        return None
    scale, event, dims = _unexpanded(scale), value.shape[-event_dim:], tuple(range(-event_dim, 0))
    squares = ((value - loc) / scale).square_().sum(dims)
    logs = scale.log().expand(*scale.shape[:-event_dim], *event).sum(dims)
    return -0.5 * squares - (logs + 0.5 * event.numel() * math.log(2 * math.pi))


def _unexpanded(tensor: Tensor) -> Tensor:
    """With dimensions of size one where all that they hold is the same memory."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _slices(logits: Tensor, sign: Tensor, event_dim: int) -> Sequence[Tensor]:
    """Parts along a leading dimension over which the signs are the same, where that pays."""
    same = sign.dim() < logits.dim() or sign.shape[0] == 1
    if logits.dim() == event_dim or not same or logits.device.type != "cpu":
        return [logits]
    return logits.split(max(1, len(logits) * _SLICE // logits.numel()))


def _log_sigmoid_sum(signed: Tensor, event_dim: int) -> Tensor | None:
    products = _folded(signed.sigmoid_().flatten(-event_dim))
    # No factor is above one: if the products are normal numbers, so were all on the way to them.
    if not bool(products.amin() >= torch.finfo(products.dtype).tiny):
        return None
    return products.log_().sum(-1)


def _folded(factors: Tensor) -> Tensor:
    """Products of at least eight along the last dimension, where it has as many."""
    together = 1
    while together < _TOGETHER and (width := factors.shape[-1]) > 1:
        half = width // 2
        product = factors[..., :half] * factors[..., half : 2 * half]
        if width % 2:
            product[..., 0] *= factors[..., -1]
        factors, together = product, 2 * together
    return factors
