"""Arithmetic of logarithms, where −inf is a number like any other."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def finite(peak: Tensor) -> Tensor:
    """Zero instead of −inf: what may be subtracted."""
    return torch.where(peak == -math.inf, 0.0, peak)


def peaked(message: Tensor, dim: int | tuple[int, ...] = -1) -> tuple[Tensor, Tensor]:
    """The message with its largest entry zero, and that entry, kept as a dimension of one."""
    peak = finite(message.detach().amax(dim, keepdim=True))
    return message - peak, peak


def log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """torch.logsumexp, with a gradient of zero instead of NaN where everything is −inf."""
    peak = finite(x.detach().amax(dim, keepdim=True))
    total = (x - peak).exp().sum(dim)
    nothing = total == 0
    result = torch.where(nothing, 1.0, total).log() + peak.squeeze(dim)
    return torch.where(nothing, -math.inf, result)


def log_matmul(left: Tensor, right: Tensor) -> Tensor:
    """ln (e^left e^right) for (…, K, K), in pieces where no gradient needs the whole."""
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        return log_sum_exp(left[..., :, :, None] + right[..., None, :, :], -2)
    shape, K = left.shape, left.shape[-1]
    # a piece of 2^18 numbers stays in a CPU's cache; a GPU wants to be busy
    size = (1 << 18 if left.device.type == "cpu" else 1 << 26) // K**3 + 1
    pieces = zip(
        left.reshape(-1, K, K).split(size), right.reshape(-1, K, K).split(size), strict=True
    )
    found = [log_sum_exp(a[:, :, :, None] + b[:, None, :, :], -2) for a, b in pieces]
    return torch.cat(found).reshape(shape)


def probabilities(logs: Tensor) -> Tensor:
    """softmax over the last dimension, but zeros where everything is −inf."""
    return (logs - finite(log_sum_exp(logs, -1)).unsqueeze(-1)).exp()
