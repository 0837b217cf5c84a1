"""What is drawn is what was given, nothing is clipped, and pyplot's state is left alone."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from lvppl.errors import ProgramError
from lvppl.inspection.plots import (
    COLOURS,
    image_grid,
    latent_plane,
    likelihood_comparison,
    likelihood_convergence,
    reconstructions,
    training_curve,
)

matplotlib.use("Agg")
RNG = np.random.default_rng(0)
EPOCHS = np.arange(1.0, 41.0)
HISTORY = {
    "loss": RNG.normal(size=400),
    "epoch": EPOCHS,
    "rate": 18 - 15 * np.exp(-EPOCHS / 10),
    "distortion": 16 + 140 * np.exp(-EPOCHS),
}
HISTORY["elbo"] = -(HISTORY["rate"] + HISTORY["distortion"])
MEANS = RNG.normal(size=(50, 4)) * [3.0, 2.0, 0.5, 0.1]
LABELS = np.arange(50) % 10


def estimate(mean: float, error: float) -> Any:
    return types.SimpleNamespace(
        log_prob=torch.full((9,), mean, dtype=torch.float64),
        std_error=torch.full((9,), error, dtype=torch.float64),
    )


def path(mean: float, error: float, most: int = 12) -> Any:
    """An estimate from 2, 4, 8 ... draws of nine data, that rises to its mean."""
    number = 2 ** torch.arange(1, most, dtype=torch.int64)
    size = number.double()[:, None].expand(-1, 9)
    trajectory = types.SimpleNamespace(
        num_samples=number,
        log_prob=mean - 3 / size,
        std_error=error * size**-0.5,
        flagged=(size < 20) & (torch.arange(9) == 4),
    )
    return types.SimpleNamespace(trajectory=trajectory)


PATHS = {"guide": path(-3.0, 2.0), "guide and prior": path(-2.0, 3.0), "prior": path(-2.0, 6.0)}
ESTIMATES = {"importance": estimate(-31.0, 0.3), "naive": estimate(-48.0, 6.0)}

DRAWINGS: dict[str, Callable[..., Axes]] = {
    "training_curve": lambda ax=None: training_curve(HISTORY, ax),
    "loss": lambda ax=None: training_curve({"loss": HISTORY["loss"]}, ax),
    "objective": lambda ax=None: training_curve({"objective": -np.exp(-EPOCHS)}, ax),
    "image_grid": lambda ax=None: image_grid(RNG.random((7, 8, 8)), ax, title="samples"),
    "reconstructions": lambda ax=None: reconstructions(
        RNG.random((5, 64)), RNG.random((5, 64)), ax
    ),
    "latent_plane": lambda ax=None: latent_plane(MEANS, ax, labels=LABELS, stds=0.2 + 0 * MEANS),
    "named classes": lambda ax=None: latent_plane(
        MEANS[:, :2], ax, labels=np.array(["left", "right"])[LABELS % 2]
    ),
    "likelihood_comparison": lambda ax=None: likelihood_comparison(
        ESTIMATES, ax, elbo=-33.0, exact=-30.9
    ),
    "likelihood_convergence": lambda ax=None: likelihood_convergence(PATHS, ax, exact=-2.0),
    "one datum": lambda ax=None: likelihood_convergence(
        PATHS, ax, exact=torch.arange(9.0) - 6, datum=4, evaluations={"prior": 100}
    ),
    "difference": lambda ax=None: likelihood_convergence(PATHS, ax, exact=-2.0, difference=True),
    "few draws": lambda ax=None: likelihood_convergence({"guide": path(-3.0, 2.0, 4)}, ax),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_axes_are_used_or_made_and_pyplot_left_alone(name: str) -> None:
    figures, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    made = DRAWINGS[name]()
    assert isinstance(made, Axes)
    assert plt.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings
    given = Figure().add_subplot()
    assert DRAWINGS[name](given) is given


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_text_is_clipped(name: str) -> None:
    figure = DRAWINGS[name]().figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    drawn, page = figure.get_tightbbox(renderer), figure.bbox_inches
    assert drawn.x0 >= page.x0 - 0.01 and drawn.x1 <= page.x1 + 0.01
    assert drawn.y0 >= page.y0 - 0.01 and drawn.y1 <= page.y1 + 0.01
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    assert all(text.get_fontsize() >= 8 for text in texts)


def test_pictures_are_written(tmp_path: Any) -> None:
    for name, draw in DRAWINGS.items():
        draw().figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 2000


# ---------------------------------------------------------------------- what is drawn


def test_training_curve_draws_the_negative_elbo_and_its_parts() -> None:
    curves = {str(line.get_label()).split(",")[0]: line for line in training_curve(HISTORY).lines}
    total = curves["−ELBO = rate + distortion"]
    np.testing.assert_array_equal(total.get_xdata(), EPOCHS)
    np.testing.assert_array_equal(total.get_ydata(), -HISTORY["elbo"])
    parts = curves["rate"].get_ydata() + curves["distortion"].get_ydata()
    np.testing.assert_allclose(parts, total.get_ydata())
    assert len({(line.get_color(), line.get_linestyle()) for line in curves.values()}) == 3


def test_training_curve_keeps_its_end_in_view_and_takes_a_fit() -> None:
    ax = training_curve(types.SimpleNamespace(history=HISTORY))
    low, high = ax.get_ylim()
    for line in ax.lines:
        assert low <= line.get_ydata()[-1] <= high
    assert high < -HISTORY["elbo"][0]  # the first epoch would flatten the rest


def test_training_curve_of_em_is_its_objective_at_each_iteration() -> None:
    objective = np.array([-9.0, -7.5, -7.25, -7.2])
    history = {"objective": objective, "loss": -objective}
    ax = training_curve(types.SimpleNamespace(history=history, tracked="hard ELBO"))
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2, 3])
    np.testing.assert_array_equal(line.get_ydata(), objective)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("iteration", "hard ELBO, nats")
    ax.figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_one_epoch_can_be_seen() -> None:
    one = {name: HISTORY[name][:1] for name in ("epoch", "elbo", "rate", "distortion")}
    assert all(line.get_marker() == "o" for line in training_curve(one).lines)


@pytest.mark.parametrize("history", [{}, {"loss": []}])
def test_nothing_to_draw(history: dict[str, Any]) -> None:
    with pytest.raises(ProgramError, match="at least one value"):
        training_curve(history)


def sheet(ax: Axes) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 64), (6, 1, 8, 8), (6, 8, 8, 1)])
def test_tiles_stand_in_reading_order(shape: tuple[int, ...]) -> None:
    images = np.arange(6.0)[:, None] * np.ones(64)
    drawn = sheet(image_grid(torch.as_tensor(images.reshape(shape)), num_columns=3))
    height, width = (drawn.shape[0] - 4) // 2, (drawn.shape[1] - 8) // 3
    centres = drawn[height // 2 :: height + 4, width // 2 :: width + 4]
    np.testing.assert_allclose(centres, np.arange(6.0).reshape(2, 3) / 5)


def test_colour_images_and_other_shapes() -> None:
    colour = RNG.random((4, 3, 16, 16))
    assert sheet(image_grid(colour)).shape[2] == 3
    np.testing.assert_array_equal(
        sheet(image_grid(colour)), sheet(image_grid(np.moveaxis(colour, 1, 3)))
    )
    drawn = sheet(image_grid(RNG.random((2, 12)), image_shape=(2, 6), num_columns=1))
    assert drawn.shape[1] == 3 * (drawn.shape[0] - 4) // 2
    with pytest.raises(ProgramError, match="no square image"):
        image_grid(RNG.random((2, 12)))
    with pytest.raises(ProgramError, match="are not"):
        image_grid(RNG.random((2, 5, 12, 12)))


def test_reconstructions_stand_below_their_data_on_its_scale() -> None:
    data, rebuilt = np.zeros((3, 64)), np.full((3, 64), 0.5)
    data[:, 0] = 2.0
    drawn = sheet(reconstructions(data, rebuilt, num_images=2))
    half = (drawn.shape[0] - 4) // 2
    assert drawn[half // 2, half // 2] == 0.0
    assert drawn[-half // 2, half // 2] == 0.25
    assert drawn.shape[1] == 2 * half + 4
    with pytest.raises(ProgramError, match="do not match"):
        reconstructions(data, rebuilt[:2])


def test_two_dimensions_are_drawn_as_they_are() -> None:
    ax = latent_plane(MEANS[:, :2])
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), MEANS[:, :2])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_1$", "$z_2$")


def test_more_dimensions_are_projected_on_their_principal_axes() -> None:
    ax = latent_plane(MEANS)
    offsets = np.asarray(ax.collections[0].get_offsets())
    variances = np.linalg.eigvalsh(np.cov(MEANS.T))[::-1]
    np.testing.assert_allclose(offsets.var(0, ddof=1), variances[:2])
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 1e-10
    assert f"{variances[0] / variances.sum():.0%}" in ax.get_xlabel()
    np.testing.assert_array_equal(
        latent_plane(MEANS, project="first").collections[0].get_offsets(), MEANS[:, :2]
    )


def test_ellipses_are_one_standard_deviation_of_the_projection() -> None:
    stds = np.abs(RNG.normal(size=MEANS.shape)) + 0.1
    ax = latent_plane(MEANS, stds=stds, num_ellipses=50)
    ellipses = ax.collections[0]
    centred = MEANS - MEANS.mean(0)
    basis = np.linalg.svd(centred, full_matrices=False)[2][:2]
    covariance = np.einsum("ad,nd,bd->nab", basis, stds**2, basis)
    area = np.pi * np.sqrt(np.linalg.det(covariance))
    np.testing.assert_allclose(np.pi / 4 * ellipses.get_widths() * ellipses.get_heights(), area)
    # Wide ellipses are inside the view as well.
    low, high = sorted(ax.get_xlim())
    reach = np.sqrt(covariance[:, 0, 0])
    offsets = np.asarray(ellipses.get_offsets())[:, 0]
    assert low <= (offsets - reach).min() and (offsets + reach).max() <= high
    angle = np.radians(ellipses.get_angles()[0])
    direction = np.array([np.cos(angle), np.sin(angle)])
    axis = ellipses.get_widths()[0] / 2
    signs = np.sign(basis[np.arange(2), np.abs(basis).argmax(1)])
    signed = covariance[0] * np.outer(signs, signs)
    assert direction @ signed @ direction == pytest.approx(axis**2)


def test_classes_differ_in_colour_and_in_glyph() -> None:
    ax = latent_plane(MEANS, labels=LABELS)
    groups = ax.collections
    assert len(groups) == 10
    assert len({tuple(g.get_facecolor()[0]) for g in groups}) == 10
    assert len({g.get_paths()[0].vertices.tobytes() for g in groups}) == 10
    assert len(set(COLOURS)) == len(COLOURS)
    named = latent_plane(MEANS, labels=np.array(["left", "right"])[LABELS % 2])
    assert [t.get_text() for t in named.get_legend().get_texts()] == ["left", "right"]


def test_shapes_of_the_plane_are_checked() -> None:
    with pytest.raises(ProgramError, match="at least 2"):
        latent_plane(MEANS[:, :1])
    with pytest.raises(ProgramError, match="49 labels for 50"):
        latent_plane(MEANS, labels=LABELS[1:])
    with pytest.raises(ProgramError, match="stds must be"):
        latent_plane(MEANS, stds=MEANS[:, :2])
    with pytest.raises(ProgramError, match="project"):
        latent_plane(MEANS, project="tsne")


def test_likelihoods_and_their_errors() -> None:
    ax = likelihood_comparison(ESTIMATES, elbo=torch.full((9,), -33.0), exact=-30.9)
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["ELBO", "importance", "naive"]
    texts = [text.get_text() for text in ax.texts]
    # two standard errors of a mean over 9 data: 2 * 0.3 / sqrt(9) and 2 * 6 / sqrt(9)
    assert texts == ["−33.00", "−31.00 ± 0.20", "−48.00 ± 4.00", "exact −30.90"]
    low, high = ax.get_xlim()
    assert low < -52.0 and high > -30.9
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top
    with pytest.raises(ProgramError, match="nothing to compare"):
        likelihood_comparison({})


def test_convergence_draws_means_bands_and_the_exact_value() -> None:
    ax = likelihood_convergence(PATHS, exact=torch.tensor([-1.0, -3.0]))
    curves = [line for line in ax.lines if len(line.get_xdata()) == 11]
    assert len(curves) == 3 and len(ax.collections) == 6  # a band and its hatched part
    assert curves[0].get_xdata().tolist() == [2**k for k in range(1, 12)]
    assert curves[0].get_ydata()[-1] == pytest.approx(-3.0 - 3 / 2**11)
    # two standard errors of a mean of nine data, after two draws, where one is flagged
    band = ax.collections[1].get_paths()[0].vertices
    at_two = band[band[:, 0] == 2.0][:, 1]
    assert at_two.max() - at_two.min() == pytest.approx(4 * 2.0 / math.sqrt(2) / 3)
    names = [text.get_text() for text in ax.texts]
    assert names == ["exact  −2.00", "guide  −3.00", "guide and prior  −2.00", "prior  −2.00"]
    assert any(np.allclose(line.get_ydata(), -2.0) for line in ax.lines)  # the exact value
    heights = sorted(text.xy[1] for text in ax.texts)
    assert min(np.diff(heights)) > 0.05  # of the axes
    ticks = [label.get_text() for label in ax.get_xticklabels()]
    assert "1,000" in ticks


def test_convergence_is_hollow_and_hatched_where_flagged() -> None:
    """One of nine data is flagged up to 16 draws."""
    ax = likelihood_convergence({"guide": PATHS["guide"]})
    _, filled, hollow = ax.lines[:3]
    assert hollow.get_xdata().tolist() == [2, 4, 8, 16] and len(filled.get_xdata()) == 7
    assert hollow.get_markerfacecolor() == "white" != filled.get_markerfacecolor()
    plain, hatched = (one.get_paths()[0].vertices[:, 0] for one in ax.collections)
    assert (plain.min(), plain.max(), hatched.min(), hatched.max()) == (32, 2048, 2, 32)
    assert ax.collections[1].get_hatch() and "flagged" in ax.get_title("left")
    of_another = likelihood_convergence({"guide": PATHS["guide"]}, datum=3)
    assert of_another.get_title("left") == "" and len(of_another.collections) == 1


def test_convergence_of_one_datum_by_evaluations() -> None:
    ax = likelihood_convergence(
        PATHS, exact=torch.arange(9.0) - 6, datum=4, evaluations={"prior": 100}
    )
    assert [line.get_xdata()[0] for line in ax.lines[::3][:3]] == [2, 2, 200]
    assert any(np.allclose(line.get_ydata(), -2.0) for line in ax.lines)  # the exact value
    assert "evaluations" in ax.get_xlabel() and "per datum" not in ax.get_ylabel()
    band = ax.collections[0].get_paths()[0].vertices  # two standard errors of one datum
    at_end = band[band[:, 0] == 2048.0][:, 1]
    assert at_end.max() - at_end.min() == pytest.approx(4 * 2.0 / math.sqrt(2048))
    less = likelihood_convergence(PATHS, exact=-2.0, datum=4, difference=True)
    assert less.lines[0].get_ydata()[-1] == pytest.approx(-1.0 - 3 / 2**11)
    names = [text.get_text() for text in less.texts]
    assert names == ["exact  −2.00", "guide  −1.00", "guide and prior  −0.00", "prior  −0.00"]
    assert less.get_yscale() == "symlog" and "estimate − exact" in less.get_ylabel()
    for wrong, message in (
        ({"datum": 9}, "from 0 to 8"),
        ({"evaluations": {"x": 2}}, "names"),
        ({"difference": True}, "exact="),
    ):
        with pytest.raises(ProgramError, match=message):
            likelihood_convergence(PATHS, **wrong)  # type: ignore[arg-type]


def test_convergence_needs_trajectories() -> None:
    with pytest.raises(ProgramError, match="trajectory=True"):
        likelihood_convergence(ESTIMATES)
    with pytest.raises(ProgramError, match="at least one"):
        likelihood_convergence({})
