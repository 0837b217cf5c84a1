"""Sufficient statistics that belong to one entry each: counts, successes, powers and slopes.

===========  ==========================  ============================
simplex      ``count``                   N of Σ N ln θ
probability  ``success``, ``failure``    a, b of a ln θ + b ln(1 − θ)
rate         ``power``, ``slope``        N, S of N ln θ − S θ
===========  ==========================  ============================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import Peeled, weight_total, weighted_total

__all__ = ["bernoulli", "categorical", "exponential", "geometric", "multinomial", "poisson"]


def categorical(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    index = bound["probs"].index
    batch, num = index.shape[:-1], index.shape[-1]
    value, weight = peeled.value.long().clamp(0, num - 1), peeled.weight
    full = torch.broadcast_shapes(weight.shape, value.shape, batch)
    # what neither the value nor the row depends on is summed first
    shared = [
        i
        for i in range(-len(full), 0)
        if _size(value, i) == 1 and (len(batch) < -i or batch[i] == 1) and full[i] > 1
    ]
    weight = weight.expand(full).sum(shared, keepdim=True) if shared else weight.expand(full)
    cell = torch.arange(batch.numel(), device=value.device).reshape(batch)
    flat = (cell * num + value).expand(weight.shape)
    counts = torch.zeros(batch.numel() * num, dtype=torch.float64, device=value.device)
    counts.index_add_(0, flat.flatten(), weight.double().flatten())
    into.add("count", index.to(value.device), counts.reshape(index.shape))


def _size(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim] if tensor.dim() >= -dim else 1


def multinomial(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    index = bound["probs"].index.to(peeled.value.device)
    into.add("count", index, weighted_total(peeled.weight.unsqueeze(-1), peeled.value, index.shape))


def bernoulli(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    index = bound["probs"].index.to(peeled.value.device)
    total = getattr(peeled.base, "total_count", torch.ones(()).to(peeled.weight))
    value = peeled.value.to(peeled.weight)
    into.add("success", index, weighted_total(peeled.weight, value, index.shape))
    into.add("failure", index, weighted_total(peeled.weight, total - value, index.shape))


def geometric(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    index = bound["probs"].index.to(peeled.value.device)
    into.add("success", index, weight_total(peeled.weight, peeled.value, index.shape))
    into.add("failure", index, weighted_total(peeled.weight, peeled.value, index.shape))


def poisson(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    binding = bound["rate"]
    index = binding.index.to(peeled.value.device)
    exposure = weight_total(peeled.weight, peeled.value, index.shape) * binding.coefficient.to(
        index.device
    )
    value = peeled.value.to(peeled.weight)
    into.add("power", index, weighted_total(peeled.weight, value, index.shape))
    into.add("slope", index, exposure)


def exponential(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    binding = bound["rate"]
    index = binding.index.to(peeled.value.device)
    total = weighted_total(peeled.weight, peeled.value, index.shape)
    into.add("power", index, weight_total(peeled.weight, peeled.value, index.shape))
    into.add("slope", index, total * binding.coefficient.to(index.device))
