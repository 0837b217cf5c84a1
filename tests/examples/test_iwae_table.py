"""The IWAE table: its schedule is the paper's, it goes on where it was stopped, it is stable."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lvppl

ROOT = Path(__file__).resolve().parent.parent.parent
SAVED = [1, 2, 2, 3, 4, 4]
FILES = [f"mnist/{name}-ubyte.gz" for name in ("train-images-idx3", "t10k-images-idx3")]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("iwae_table")


def test_the_full_schedule_is_that_of_the_paper(example):
    full = example.SCHEDULES["full"]
    assert (full.num_images, full.batch_size, full.num_test, full.num_samples) == (
        60_000, 20, 10_000, 5_000,
    )  # fmt: skip
    assert full.num_epochs == 3280
    rates = [1e-3 * full.learning_rate(epoch) for epoch in range(full.num_epochs)]
    want = [1e-3 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert rates == pytest.approx(want, rel=1e-12)
    assert rates[-1] == pytest.approx(1e-4)


def test_a_stopped_entry_goes_on(example, monkeypatch, tmp_path, requires_data):
    """Weights, batches, pixels and the learning rate are those of a run that was not stopped."""
    for name in FILES:
        requires_data(name)
    tiny = example.Schedule(200, 50, 2, 10, 20)  # 1 + 3 epochs
    monkeypatch.setitem(example.SCHEDULES, "short", tiny)

    def run(folder):
        options = ["--schedule", "short", "--k", "2", "--seed", "3", "--save-every", "0"]
        options += ["--device", "cpu", "--out", str(tmp_path / folder)]
        monkeypatch.setattr(sys, "argv", ["examples/iwae_table.py", *options])
        example.main()
        with (tmp_path / folder / "results.csv").open(newline="") as file:
            return list(csv.DictReader(file))[-1]

    want = run("whole")
    save, saves = lvppl.Fit.save, []

    def stop_at_the_second(fit, folder):
        save(fit, folder)
        saves.append(fit.num_epochs)
        if saves == [1, 2]:  # as by ctrl-C, upon which the fit is saved once more
            raise KeyboardInterrupt

    monkeypatch.setattr(lvppl.Fit, "save", stop_at_the_second)
    with pytest.raises(SystemExit, match="stopped after 2 of 4 epochs"):
        run("stopped")
    found = run("stopped")
    assert saves == SAVED
    assert found["nll"] == want["nll"] and found["epochs"] == want["epochs"] == "4"
    assert found["seed"] == "3" and found["paper"] == "nan"
    run("stopped")  # is finished: only measured again
    assert saves == SAVED
    table = (tmp_path / "stopped" / "results.md").read_text()
    assert len(table.splitlines()) == 4 and table.count(f"| {want['nll']} |") == 2


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 5])
def test_the_short_schedule_gives_what_it_gave(tmp_path, requires_data, k):
    for name in FILES:
        requires_data(name)
    options = ["--schedule", "short", "--k", str(k), "--seed", "7", "--out", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "examples/iwae_table.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("reached ") == 1
