"""How every example begins: the options that it takes."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["command_line"]


def command_line(
    text: str,
    *,
    out: str,
    quick: str,
    seed: str | None = "of the start",
    **whole: tuple[int, str],
) -> argparse.Namespace:
    """``--out``, ``--quick`` and ``--seed``, as they were given, and options of the example's own.

    Args:
        text: whose first line says what the example is.
        out: the folder unless another is named.
        quick, seed: what these options do; without the latter there is no such option.
        **whole: of whole numbers from 1 up, by name: what each is unless given, and what it does.
    """
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(out), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help=f"{quick}, for tests")
    if seed is not None:
        parser.add_argument("--seed", type=int, default=0, help=seed)
    for name, (default, help_text) in whole.items():
        parser.add_argument(
            f"--{name}", type=_whole, default=default, help=f"{help_text} (default {default})"
        )
    return parser.parse_args()


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {number}")
    return number
