"""Linear layers by the faster of torch's two libraries, where no gradient is wanted.

torch multiplies single-precision matrices on a processor by MKL. On processors that Intel did not
make, MKL leaves half of the vector unit alone (it takes its AVX2 kernels where there is AVX-512);
oneDNN, the other library inside torch, does not, and is twice as fast. The numbers are the same up
to rounding.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FastLinear", "pays"]

_WORTH = 2**22  # multiply-adds: a few tens of microseconds


class FastLinear(TorchFunctionMode):
    """Calls of ``torch.nn.functional.linear`` go to oneDNN where that is right and pays."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs and _fits(*args):
            x, weight, bias = (*args, None)[:3]
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _fits(x: Any, weight: Any, bias: Any = None) -> bool:
    given = [t for t in (x, weight, bias) if t is not None]
    return (
        pays()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in given)
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
        and all(t.layout == torch.strided for t in given)
        and weight.dim() == 2
        and x.dim() > 1
        and x.numel() * len(weight) >= _WORTH
    )


@functools.cache
def pays() -> bool:
    """Whether this processor has vector units that MKL leaves alone and oneDNN does not."""
    return (
        torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    described = Path("/proc/cpuinfo")
    return described.read_text()[:4096] if described.is_file() else ""
