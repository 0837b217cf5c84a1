"""What every public function takes, checked and in one shape: :class:`Chain`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.errors import ProgramError


@dataclass(frozen=True)
class Chain:
    """The factors with one batch dimension: transition is (B or 1, T−1 or 1, K, K)."""

    initial: Tensor
    transition: Tensor
    emission: Tensor
    lengths: Tensor | None
    batch_shape: torch.Size

    @property
    def B(self) -> int:
        return self.emission.shape[0]

    @property
    def T(self) -> int:
        return self.emission.shape[1]

    @property
    def K(self) -> int:
        return self.emission.shape[2]

    @property
    def homogeneous(self) -> bool:
        return self.transition.shape[1] == 1

    @property
    def shared(self) -> bool:
        """Whether all steps of all sequences have one transition."""
        return self.transition.shape[:2] == (1, 1)

    def exists(self) -> Tensor:
        """(B, T): which steps there are."""
        steps = torch.arange(self.T, device=self.emission.device)
        if self.lengths is None:
            return torch.ones_like(steps, dtype=torch.bool).expand(self.B, -1)
        return steps < self.lengths[:, None]

    def transition_at(self, t: int) -> Tensor:
        """ln A_t, (B or 1, K, K), from step t to step t + 1."""
        return self.transition[:, 0 if self.homogeneous else t]


def checked_chain(
    log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, lengths: Tensor | None
) -> Chain:
    """The arguments, checked and broadcast."""
    K = _require_factors(log_initial, log_transition, log_emission)
    T = log_emission.shape[-2]
    if log_transition.dim() > 2 and log_transition.shape[-3] not in (1, T - 1):
        raise ProgramError(
            f"log_transition of more than two dimensions must be (..., T - 1, K, K), or "
            f"(..., 1, K, K) for the same at every step, with T = {T} as in log_emission, but has "
            f"shape {tuple(log_transition.shape)}: where it differs by sequence only, write "
            "log_transition.unsqueeze(-3)."
        )
    if lengths is not None:
        lengths = _require_lengths(lengths, T).to(log_emission.device)
    try:
        batch_shape = torch.broadcast_shapes(
            log_initial.shape[:-1],
            log_transition.shape[:-3],
            log_emission.shape[:-2],
            () if lengths is None else lengths.shape,
        )
    except RuntimeError as error:
        raise ProgramError(
            "the batch shapes of log_initial, log_transition, log_emission and lengths must "
            f"broadcast, but are {tuple(log_initial.shape[:-1])}, "
            f"{tuple(log_transition.shape[:-3])}, {tuple(log_emission.shape[:-2])} and "
            f"{None if lengths is None else tuple(lengths.shape)}."
        ) from error
    if log_transition.dim() <= 3:
        log_transition = log_transition.reshape(1, -1, K, K)
    else:
        log_transition = log_transition.expand(*batch_shape, -1, K, K).reshape(
            math.prod(batch_shape), log_transition.shape[-3], K, K
        )
    return Chain(
        log_initial.expand(*batch_shape, K).reshape(-1, K),
        log_transition,
        log_emission.expand(*batch_shape, T, K).reshape(-1, T, K),
        None if lengths is None else lengths.expand(batch_shape).reshape(-1),
        batch_shape,
    )


def _require_factors(log_initial: Tensor, log_transition: Tensor, log_emission: Tensor) -> int:
    """K, or :class:`ProgramError` for shapes and dtypes that do not fit each other."""
    named = {
        "log_initial": log_initial,
        "log_transition": log_transition,
        "log_emission": log_emission,
    }
    for (name, factor), least in zip(named.items(), (1, 2, 2), strict=True):
        if factor.dim() < least:
            raise ProgramError(
                f"{name} must have at least {least} dimension(s), but has shape "
                f"{tuple(factor.shape)}; expected log_initial (..., K), log_transition "
                "(..., K, K) and log_emission (..., T, K)."
            )
    K = log_emission.shape[-1]
    if (
        log_initial.shape[-1] != K
        or log_transition.shape[-2:] != (K, K)
        or 0 in log_emission.shape[-2:]
    ):
        raise ProgramError(
            "log_initial, log_transition and log_emission must have shapes (..., K), (..., K, K) "
            "and (..., T, K), with T and K at least 1, but have "
            + ", ".join(str(tuple(factor.shape)) for factor in named.values())
            + "."
        )
    dtypes = {factor.dtype for factor in named.values()}
    devices = {factor.device for factor in named.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64} or len(devices) > 1:
        raise ProgramError(
            "log_initial, log_transition and log_emission must be all float32 or all float64, on "
            "one device, but are "
            + ", ".join(f"{factor.dtype} on {factor.device}" for factor in named.values())
            + ": convert them with .to(log_emission)."
        )
    return K


def _require_lengths(lengths: Tensor, T: int) -> Tensor:
    """lengths as int64, or :class:`ProgramError`. Off the CPU the range is not looked at."""
    lengths = torch.as_tensor(lengths)
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise ProgramError(
            f"lengths must be integers, one a sequence, but are {lengths.dtype}: a mask of steps "
            "has its own argument, or is mask.sum(-1) where only a sequence's end is missing."
        )
    if lengths.device.type == "cpu" and bool(((lengths < 0) | (lengths > T)).any()):
        raise ProgramError(
            f"lengths must be in 0 … {T}, the number of steps of log_emission, but range from "
            f"{int(lengths.min())} to {int(lengths.max())}: pad log_emission, or cut lengths."
        )
    return lengths.to(torch.int64)
