"""Plain runs of a program, for its structure alone, without a draw of every discrete latent."""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger

__all__ = ["FirstStates"]


class FirstStates(Messenger):
    """Gives discrete latents the first value of their support, where nothing else gives them one.

    A draw for each of a million rows takes a second, and says nothing of the structure.
    """

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        if not getattr(fn, "has_enumerate_support", False) or type(fn).__name__ == "_Subsample":
            return
        support = fn.enumerate_support(expand=False)
        msg["value"] = support[0].expand(fn.batch_shape + fn.event_shape)
        msg["done"] = True
