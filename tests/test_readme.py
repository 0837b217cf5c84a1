"""The README's code runs as written, and prints what the README shows."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.filterwarnings("ignore:k-hat is above")
def test_the_code_of_the_readme_runs(capsys):
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    scope: dict = {}
    for block in blocks[:2]:
        exec(compile(block, "README.md", "exec"), scope)
    shown = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    printed = " ".join(capsys.readouterr().out.split())
    assert " ".join(shown[0].split()) in printed

    fit = scope["fit"]
    assert fit.status == "max_steps" and fit.num_epochs == 50
    # Pixels drawn independently at their mean rates cost 24.4 nats: the latent must explain some.
    pixels = scope["y"].mean(0)
    independent = -(pixels.xlogy(pixels) + (1 - pixels).xlogy(1 - pixels)).sum()
    elbo = float(fit.report(scope["y"], seed=0).elbo.per_datum.mean())
    assert -elbo < 0.85 * float(independent)
    assert {"posterior", "log_likelihood"} <= set(scope["idata"].groups())

    exec(compile(blocks[2], "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    for line in shown[1].splitlines()[2:]:  # without the counts of iterations, which may differ
        assert "restarts" in line or line[:24] in printed, line
    assert float(scope["fit"].log_evidence(scope["y"])) == pytest.approx(-1130.2640, abs=2e-3)


def test_pictures_and_links_exist():
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (README.parent / target).exists(), target
