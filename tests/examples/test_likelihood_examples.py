"""The examples of the likelihood chapter end in their known answers, and leave a picture."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(script, folder, num_answers, *more):
    """Run an example as a user does; every known answer is reached."""
    command = [sys.executable, f"examples/{script}.py", "--quick", "--out", str(folder), *more]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MISSED" not in result.stdout and result.stdout.count("reached ") == num_answers
    assert (folder / f"{script}.png").stat().st_size > 10_000
    return result.stdout


@pytest.mark.slow
def test_naive_against_importance(tmp_path):
    text = run("naive_vs_importance", tmp_path, 5)
    assert "1,048,576 states" in text


@pytest.mark.slow
def test_fewer_bits(tmp_path):
    """Few enough for uniform draws to meet every state: the answers say that naive is no worse."""
    command = [sys.executable, "examples/naive_vs_importance.py", "--quick", "--out", str(tmp_path)]
    few = ["--bits", "6", "--epochs", "2"]
    result = subprocess.run([*command, *few], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "MISSED   uniform and prior" in result.stdout
    assert "reached  annealed: within half a nat on average" in result.stdout


def test_missing_half(tmp_path):
    text = run("missing_half", tmp_path, 7, "--epochs", "2")
    assert "exact" in text and "the top half" in text
