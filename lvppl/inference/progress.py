"""What a fit says while it runs: a bar on a terminal or in a notebook, a line now and then else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm.auto import tqdm

__all__ = ["Progress"]

_BAR_SECONDS = 0.4
_LINE_SECONDS = 10.0


def _shows_a_bar() -> bool:
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")


class Progress:
    """Reports steps and a status text, rarely enough to cost nothing.

    The text is a callable because reading it may wait for the device: it is called only when
    something is shown. Into a pipe or a file goes a plain line every ten seconds.
    """

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        self.total = total
        self.enabled = enabled
        self.bar = (
            tqdm(total=total, initial=done, desc="fit", unit="step", mininterval=_BAR_SECONDS)
            if enabled and _shows_a_bar()
            else None
        )
        self.interval = _BAR_SECONDS if self.bar is not None else _LINE_SECONDS
        self.shown = time.monotonic()

    def show(self, done: int, text: Callable[[], str], *, force: bool = False) -> None:
        """Show ``done`` steps and the text, if it is time to."""
        if not self.enabled or not (force or time.monotonic() - self.shown >= self.interval):
            return
        self.shown = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(text(), refresh=False)
            self.bar.update(done - self.bar.n)
        elif not force:
            print(f"fit: step {done} of {self.total}, {text()}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
