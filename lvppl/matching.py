"""Do model and guide speak of the same latents, and of the same data?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyro import poutine

from lvppl.errors import ProgramError

__all__ = ["check_same_subsamples", "refuse_mismatch"]


def refuse_mismatch(
    missing: Sequence[str], extra: Sequence[str], model_sites: Mapping[str, Any]
) -> None:
    """Refuse latents without a guide, and guide sites without a model."""
    if missing:
        raise ProgramError(
            f"The guide has no site for the model's latent {_quoted(missing)}: the bound would "
            f"count ln p there but no ln q. Add pyro.sample({missing[0]!r}, ...) to the guide, "
            'mark a discrete site with infer={"enumerate": "parallel"} to sum it out, or pass '
            "strict=False to draw it from its prior."
        )
    if extra:
        known = [name for name in extra if name in model_sites]
        if known:
            raise ProgramError(
                f"The guide samples {_quoted(known)}, which the model observes. Take the site out "
                "of the guide; the guide reads the data from its arguments."
            )
        raise ProgramError(
            f"The guide samples {_quoted(extra)}, which the model does not have. Rename it to a "
            'latent of the model, mark it infer={"is_auxiliary": True} if its density belongs to '
            "q, or pass strict=False if it is noise that only feeds other sites."
        )


def check_same_subsamples(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Refuse a model that draws its own minibatch where its guide drew another.

    A replay hands the guide's indices to the model's plate of the same name. A plate that only the
    model subsamples, around a latent that the guide samples elsewhere, would pair different data.
    """

    def subsampled(trace: poutine.Trace) -> set[str]:
        nodes: dict[str, Any] = dict(trace.nodes)
        return {
            name
            for name, site in nodes.items()
            if site["type"] == "sample"
            and type(site["fn"]).__name__ == "_Subsample"
            and 0 < (site["fn"].subsample_size or 0) < site["fn"].size
        }

    only_model = subsampled(model_trace) - subsampled(guide_trace)
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or name not in guide_trace.nodes:
            continue
        around = {frame.name for frame in site["cond_indep_stack"]} & only_model
        if around:
            plate = min(around)
            raise ProgramError(
                f"The model subsamples plate '{plate}' around the latent '{name}', but the guide "
                f"does not draw that plate's indices: the two would use different minibatches. Put "
                f"the guide's site in pyro.plate('{plate}', ...) of the same name and size."
            )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
