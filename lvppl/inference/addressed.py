"""Random numbers with an address: what a datum receives does not depend on who came before.

A generator gives the next number; here every number is a hash of where it is used: the SplitMix64
stream (Steele, Lea and Flood 2014, OOPSLA) whose start is a hash of (seed, site, draw in the site,
datum, sample), at the position of the element. It is vectorised, the same on every device, and
indifferent to how data and samples are cut into chunks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lvppl.tracing import PARTICLES

__all__ = ["AddressedDraws", "addressed_uniform"]

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = 2**64


def _signed(value: int) -> int:
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _mix_int(value: int) -> int:
    """SplitMix64's finaliser on 64-bit words."""
    value = (value + _GOLDEN) % _WORD
    value = (value ^ (value >> 30)) * _MULTIPLY[0] % _WORD
    value = (value ^ (value >> 27)) * _MULTIPLY[1] % _WORD
    return value ^ (value >> 31)


def _mix(x: Tensor) -> Tensor:
    """The same on an int64 tensor, in place."""
    for shift, multiply in zip((30, 27), _MULTIPLY, strict=True):
        x ^= (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        x *= _signed(multiply)
    x ^= (x >> 31).bitwise_and_((1 << 33) - 1)
    return x


class AddressedDraws(Messenger):
    """Draws latent sites from noise addressed by site, datum and sample."""

    def __init__(
        self,
        seed: int,
        data_plate: str | None,
        first_datum: int,
        first_sample: int,
        unaddressed: set[str],
    ) -> None:
        super().__init__()
        self.seed = seed
        self.data_plate = data_plate
        self.first_datum = first_datum
        self.first_sample = first_sample
        self.unaddressed = unaddressed

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        if type(msg["fn"]).__name__ == "_Subsample":
            return
        dims = {frame.name: frame.dim for frame in msg["cond_indep_stack"] if frame.dim is not None}
        noise = _Noise(
            _mix_int(_mix_int(self.seed) ^ zlib.crc32(msg["name"].encode())),
            torch.Size(msg["fn"].batch_shape),
            (dims.get(PARTICLES), self.first_sample),
            (dims.get(self.data_plate), self.first_datum),
        )
        with _AddressedOperators(noise):
            msg["value"] = self.drawn(msg)
        msg["done"] = True
        if noise.missed:
            self.unaddressed.add(msg["name"])

    def drawn(self, msg: Any) -> Tensor:
        """A draw of the site, by torch's operators, whose noise is replaced."""
        value: Tensor = msg["fn"](*msg["args"], **msg["kwargs"])
        return value


def addressed_uniform(
    seed: int, purpose: str, shape: Sequence[int], first: tuple[int, int], device: torch.device
) -> Tensor:
    """Float64 uniform on (0, 1), (samples, data, ...): a function of seed, purpose and address.

    Args:
        first: indices of the first sample and of the first datum.
    """
    key = _mix_int(_mix_int(seed) ^ zlib.crc32(purpose.encode()))
    noise = _Noise(key, torch.Size(shape[:2]), (-2, first[0]), (-1, first[1]))
    return noise.uniform(shape, device)


class _Noise:
    """Noise for the draws of one site. Axes are (dimension from the right, first index)."""

    def __init__(self, key: int, batch: torch.Size, sample: Any, datum: Any) -> None:
        self.key = key
        self.batch = batch
        self.axes = [
            (None if dim is None else len(batch) + dim, first) for dim, first in (sample, datum)
        ]
        self.draws = 0
        self.missed = False

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the leading dimensions are the site's batch, so that its data can be told."""
        return tuple(shape[: len(self.batch)]) == tuple(self.batch)

    def words(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Independent 64-bit words, int64, of the next draw of this site."""
        self.draws += 1
        keys = torch.full((1,) * len(shape), _signed(_mix_int(self.key ^ self.draws)))
        keys = keys.to(device)
        rest = list(shape)
        for axis, first in self.axes:
            if axis is None:
                keys = _mix(keys + _signed(first * _GOLDEN))
                continue
            size, rest[axis] = rest[axis], 1
            index = torch.arange(first, first + size, device=device) * _signed(_GOLDEN)
            keys = _mix(keys + index.reshape(-1, *(1,) * (len(shape) - axis - 1)))
        position = torch.arange(1, math.prod(rest) + 1, device=device) * _signed(_GOLDEN)
        return _mix(keys + position.reshape(rest))

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Float64 uniform on the open interval (0, 1)."""
        words = (self.words(shape, device) >> 12).bitwise_and_((1 << 52) - 1)
        return words.to(torch.float64).add_(0.5).mul_(2.0**-52)

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Float64 standard normal."""
        symmetric = (self.words(shape, device) >> 11).to(torch.float64).add_(0.5).mul_(2.0**-52)
        return symmetric.erfinv_().mul_(math.sqrt(2.0))

    def log_gamma(self, shape_parameter: Tensor) -> Tensor:
        """ln of standard gamma draws (Marsaglia & Tsang 2000, ACM TOMS 26), float64.

        Rejections are redrawn under the next address, so that rounds of others change nothing.
        """
        alpha = shape_parameter.to(torch.float64)
        where = alpha.shape, alpha.device
        small = alpha < 1
        boost = torch.where(small, self.uniform(*where).log() / alpha, 0.0)
        d = torch.where(small, alpha + 1, alpha) - 1 / 3
        result = torch.full_like(alpha, math.nan)
        first = self.draws
        while bool(result.isnan().any()):
            z, u = self.normal(*where), self.uniform(*where)
            root = 1 + z / (9 * d).sqrt()
            log_v = 3 * root.log()
            accept = (root > 0) & (u.log() < 0.5 * z * z + d - d * root**3 + d * log_v)
            result = torch.where(result.isnan() & accept, d.log() + log_v, result)
            if self.draws - first > 2000:  # NaN or infinite concentrations never accept
                break
        self.draws = first + 4096  # what follows does not depend on the number of rounds
        return result + boost


def _narrow(value: Tensor, like: Tensor) -> Tensor:
    """A uniform in the dtype wanted, kept below one."""
    return value.to(like.dtype).clamp_(max=1 - torch.finfo(like.dtype).eps / 2)


class _AddressedOperators(TorchDispatchMode):
    """Replaces torch's random operators by addressed noise where shapes allow."""

    def __init__(self, noise: _Noise) -> None:
        super().__init__()
        self.noise = noise

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        draw = _OPERATORS.get(func.overloadpacket)
        result = draw(self.noise, func, args, kwargs) if draw is not None else None
        if result is None:
            self.noise.missed = True
            return func(*args, **kwargs)
        return result


def _in_place(
    transform: Callable[..., Tensor],
) -> Callable[[_Noise, Any, tuple[Any, ...], dict[str, Any]], Tensor | None]:
    """normal_(mean, std) and its like: the operator's first argument is the output."""

    def draw(noise: _Noise, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        out = args[0]
        if not noise.fits(out.shape) or not out.is_floating_point():
            return None
        names = [argument.name for argument in func._schema.arguments[1:3]]
        defaults = [argument.default_value for argument in func._schema.arguments[1:3]]
        given = dict(zip(names, defaults, strict=True)) | dict(zip(names, args[1:], strict=False))
        given |= {name: kwargs[name] for name in names if name in kwargs}
        options = [given[name] for name in names if name != "generator"]
        return out.copy_(transform(noise, out, *options))

    return draw


def _fresh(kind: str) -> Callable[..., Tensor | None]:
    """rand(shape), randn_like(tensor): the output is made by calling the operator."""

    def draw(noise: _Noise, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        shape = args[0].shape if isinstance(args[0], Tensor) else args[0]
        if not noise.fits(shape):
            return None
        like = func(*args, **kwargs)  # for its dtype, device and layout
        value = getattr(noise, kind)(like.shape, like.device)
        return like.copy_(_narrow(value, like) if kind == "uniform" else value)

    return draw


def _normal_in_place(noise: _Noise, out: Tensor, mean: float, std: float) -> Tensor:
    normal = noise.normal(out.shape, out.device)
    return normal if (mean, std) == (0, 1) else mean + std * normal


def _normal(noise: _Noise, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """normal(mean, std) with at least one tensor."""
    tensors = [x for x in args[:2] if isinstance(x, Tensor)]
    if not tensors or len(args) < 2:
        return None
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    if not noise.fits(shape):
        return None
    return args[0] + args[1] * noise.normal(shape, tensors[0].device).to(tensors[0].dtype)


def _bernoulli(noise: _Noise, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    out = args[0]
    if not noise.fits(out.shape):
        return None
    probability = args[1] if len(args) > 1 and args[1] is not None else out
    return (noise.uniform(out.shape, out.device) < probability).to(out.dtype)


def _multinomial(noise: _Noise, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Rows are the site's batch, flattened: draws by inverting the cumulative sum."""
    weights, number = args[0].to(torch.float64), args[1]
    replacement = args[2] if len(args) > 2 else kwargs.get("replacement", False)
    rows = weights.shape[0] if weights.dim() == 2 else 1
    if rows != noise.batch.numel() or (number > 1 and not replacement):
        return None
    cumulative = weights.reshape(rows, -1).cumsum(-1)
    u = noise.uniform((*noise.batch, number), weights.device).reshape(rows, number)
    index = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return index.clamp_(max=cumulative.shape[-1] - 1).reshape(*weights.shape[:-1], number)


def _gamma(noise: _Noise, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    alpha = args[0]
    return noise.log_gamma(alpha).exp().to(alpha.dtype) if noise.fits(alpha.shape) else None


def _dirichlet(noise: _Noise, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    alpha = args[0]
    return noise.log_gamma(alpha).softmax(-1).to(alpha.dtype) if noise.fits(alpha.shape) else None


def _uniform_between(noise: _Noise, out: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * _narrow(noise.uniform(out.shape, out.device), out)


_aten = torch.ops.aten
_OPERATORS: dict[Any, Callable[..., Tensor | None]] = {
    _aten.normal_: _in_place(_normal_in_place),
    _aten.uniform_: _in_place(_uniform_between),
    _aten.exponential_: _in_place(
        lambda n, out, rate: -n.uniform(out.shape, out.device).log() / rate
    ),
    _aten.cauchy_: _in_place(
        lambda n, out, median, sigma: (
            median + sigma * (math.pi * (n.uniform(out.shape, out.device) - 0.5)).tan()
        )
    ),
    _aten.normal: _normal,
    _aten.randn: _fresh("normal"),
    _aten.randn_like: _fresh("normal"),
    _aten.rand: _fresh("uniform"),
    _aten.rand_like: _fresh("uniform"),
    _aten.bernoulli: _bernoulli,
    _aten.multinomial: _multinomial,
    _aten._standard_gamma: _gamma,
    _aten._sample_dirichlet: _dirichlet,
}
