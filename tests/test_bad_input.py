"""Nothing that a user may get wrong passes in silence, or fails without a word of help."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.bad_inputs import PAGE, TOPICS, Attempt, BadInput, error_of, page

CASES = [case for cases in TOPICS.values() for case in cases]
ATTEMPTS = [
    pytest.param(case, attempt, id=" by ".join(filter(None, (case.title, name))))
    for case in CASES
    for name, attempt in case.attempts.items()
]


@pytest.mark.parametrize(("case", "attempt"), ATTEMPTS)
def test_refused_by_name_and_with_a_remedy(case: BadInput, attempt: Attempt) -> None:
    error = error_of(attempt)
    assert isinstance(error, case.error), f"{error!r} is not a {case.error.__name__}"
    assert not case.unsaid(error), f"the message lacks {case.unsaid(error)}: {error}"
    # Pyro appends the shapes of all sites: a screenful, mostly about what is right.
    assert "Trace Shapes" not in str(error)


def test_enough_was_tried() -> None:
    titles = [case.title for case in CASES]
    assert len(CASES) >= 40
    assert len(set(titles)) == len(titles)
    assert all(case.says for case in CASES)


def pinned_torch() -> str:
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    return re.findall(r"^torch==(\S+)", constraints.read_text(), re.MULTILINE)[0]


@pytest.mark.skipif(
    torch.__version__.partition("+")[0] != pinned_torch(),
    reason="the page quotes messages of the tested torch",
)
def test_the_page_is_what_the_registry_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.bad_inputs"
