"""The demo ends in its known answers, and leaves what the README promises."""

import subprocess
import sys
from pathlib import Path

import arviz
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_the_demo_reaches_its_answers(tmp_path):
    command = [sys.executable, "examples/demo.py", "--quick", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MISSED" not in result.stdout and result.stdout.count("reached ") == 5
    for name in ("training", "reconstructions", "samples", "latent_plane", "likelihood"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    posterior = arviz.from_netcdf(tmp_path / "posterior.nc").posterior
    assert posterior["z"].dims[:3] == ("chain", "draw", "data")
    assert np.isfinite(posterior["z"]).all()
