"""Layers of networks by the faster of torch's two libraries, where no gradient is wanted.

In single precision on a processor,

* torch multiplies matrices by MKL. On processors that Intel did not make, MKL leaves half of the
  vector unit alone (it takes its AVX2 kernels where there is AVX-512); oneDNN, the other library
  inside torch, does not, and is twice as fast;
* a tanh of torch takes four times as long as one of oneDNN.

The numbers are the same up to rounding, to seven digits relatively, also of a tanh near zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FastLayers", "linear_pays"]

_WORTH = 2**22  # multiply-adds: a few tens of microseconds
_WORTH_TANH = 2**14
_AT_ONCE = 2**19  # numbers whose copies the allocator keeps rather than returns


class FastLayers(TorchFunctionMode):
    """Calls of ``linear`` and ``tanh`` go to oneDNN where that is right and pays."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        ours = _OURS.get(func)  # most calls are of something else: no more is done for them
        if ours is not None and not kwargs and not torch.is_grad_enabled():
            found = ours(*args)
            if found is not None:
                return found
        return func(*args, **kwargs) if kwargs else func(*args)


def _linear(x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    if not _linear_fits(x, weight, bias):
        return None
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _tanh(x: Any) -> Tensor | None:
    if not _tanh_fits(x):
        return None
    parts = [part.to_mkldnn().tanh().to_dense() for part in x.flatten().split(_AT_ONCE)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(x.shape)


_OURS: dict[Any, Callable[..., Tensor | None]] = {
    torch.nn.functional.linear: _linear,
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
}


def _tanh_fits(x: Any) -> bool:
    return _fits(x) and x.numel() >= _WORTH_TANH and tanh_pays() and not _differentiated()


def _differentiated() -> bool:
    """Whether torch.func or forward-mode derivatives are at work, which no_grad does not stop."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    level = getattr(torch.autograd.forward_ad, "_current_level", -1)
    return level >= 0 or (active is not None and bool(active()))


def _linear_fits(x: Any, weight: Any, bias: Any = None) -> bool:
    given = [t for t in (x, weight, bias) if t is not None]
    return (
        all(_fits(t) for t in given)
        and not _differentiated()
        # oneDNN reads a bias as if it were contiguous, whatever its strides
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and not torch.is_autocast_enabled("cpu")
        and weight.dim() == 2
        and x.dim() > 1
        and x.shape[-1] == weight.shape[1]
        and x.numel() * len(weight) >= _WORTH
        and linear_pays()
    )


def _fits(x: Any) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and bool(torch.backends.mkldnn.enabled)
    )


@functools.cache
def tanh_pays() -> bool:
    """Whether oneDNN is there and knows this processor's vector unit."""
    capability = torch.backends.cpu.get_cpu_capability()
    return torch.backends.mkldnn.is_available() and capability.startswith("AVX")


@functools.cache
def linear_pays() -> bool:
    """Whether this processor has vector units that MKL leaves alone and oneDNN does not."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
        and _linear_works()
    )


def _linear_works() -> bool:
    """The operator is not a public one: other versions of torch may have none, or another."""
    x, weight = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)
    bias = torch.ones(4)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.allclose(found, x @ weight.T + bias)


def _processor() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    described = Path("/proc/cpuinfo")
    return described.read_text()[:4096] if described.is_file() else ""
