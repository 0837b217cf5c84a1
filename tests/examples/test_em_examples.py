"""The examples of the EM chapter end in their known answers, and leave a picture."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(script, folder, num_answers, picture):
    """Run an example as a user does; every known answer is reached."""
    command = [sys.executable, f"examples/{script}.py", "--quick", "--out", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MISSED" not in result.stdout and result.stdout.count("reached ") == num_answers
    assert (folder / picture).stat().st_size > 20_000
    return result.stdout


def test_old_faithful(tmp_path):
    assert "-4.155382 nats" in run("old_faithful", tmp_path, 4, "old_faithful.png")


def test_colour_quantisation(tmp_path):
    run("colour_quantisation", tmp_path, 3, "colours.png")


@pytest.mark.slow
def test_digits_clustering(tmp_path):
    run("digits_clustering", tmp_path, 4, "digits_clustering.png")


@pytest.mark.slow
def test_chorales(tmp_path, requires_data):
    requires_data("jsb-chorales-quarter.json")  # and names its folder for the example
    run("chorales_hmm", tmp_path, 4, "chorales.png")
