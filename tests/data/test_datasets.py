"""The named data sets: what they hold, against what is published of them."""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images

from lvppl import data
from lvppl.data.handwriting import parse_idx
from lvppl.data.pixels import static_binarized
from lvppl.data.verified import VerifiedFile
from lvppl.errors import ProgramError

DIGITS = load_digits()


def test_digits_are_those_of_scikit_learn_in_another_order() -> None:
    split = data.digits(dtype=torch.float64)
    assert (len(split.train), len(split.test)) == (1438, 359)
    rows = torch.cat([split.train.grey(), split.test.grey()]).flatten(1)
    labels = torch.cat([split.train.labels, split.test.labels])
    found = torch.cat([rows, labels[:, None]], dim=1).tolist()
    expected = np.column_stack([DIGITS.data, DIGITS.target]).astype(int).tolist()
    assert sorted(found) == sorted(expected)
    assert split.train.levels == 17
    assert split.train.images.dtype == torch.float64


def test_the_split_depends_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = data.digits(seed=3), data.digits(seed=3), data.digits(seed=4)
    assert torch.equal(one.test.images, same.test.images)
    assert not torch.equal(one.test.labels, other.test.labels)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 1.5, 1e-5, float("nan")])
def test_a_split_with_an_empty_side_is_refused(fraction: float) -> None:
    with pytest.raises(ProgramError, match="test_fraction must leave data on both sides"):
        data.digits(test_fraction=fraction)


@pytest.mark.parametrize("seed", [-1, 2**31, 1.0, True])
def test_a_seed_must_be_a_whole_number(seed: object) -> None:
    with pytest.raises(ProgramError, match="seed must be a whole number"):
        data.digits(seed=seed)


@pytest.mark.parametrize("loader", [data.digits, data.mnist])
def test_an_unknown_binarization_is_refused_before_any_file(loader: Callable) -> None:
    with pytest.raises(ProgramError, match=r"'dynamic'.*'static'.*None.*'stochastic'"):
        loader(binarize="stochastic")


def test_the_static_draw_is_the_same_everywhere() -> None:
    """The digest is of a draw from a frozen stream: it can change only if the data set changes."""
    split = data.digits(binarize="static", seed=0)
    pixels = torch.cat([split.train.images, split.test.images])
    assert set(pixels.unique().tolist()) == {0.0, 1.0}
    assert split.train.levels == 2
    assert torch.equal(split.train.epoch(), split.train.images)
    digest = hashlib.sha256(pixels.to(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest == "c221fd19b734a2c7291a365bf37a42c63bcfab44b338040d814eb4dfe2407e6b"


def test_static_pixels_are_bernoulli_of_the_intensity() -> None:
    """17 levels, n draws each: within 5 standard errors (false alarm below 1e-5 in all)."""
    n = 20_000
    levels = np.repeat(np.arange(17), n)
    means = static_binarized(levels, 17, seed=1).reshape(17, n).mean(1)
    p = np.arange(17) / 16
    assert (np.abs(means - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()  # exactly 0 and 1 at the ends


def test_static_draws_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = np.random.RandomState(0).randint(0, 256, (7, 11, 13))
    whole = static_binarized(levels, 256, seed=5)
    monkeypatch.setattr("lvppl.data.pixels._CHUNK", 10)
    assert (static_binarized(levels, 256, seed=5) == whole).all()


def test_dynamic_pixels_are_drawn_afresh_and_are_bernoulli_of_the_intensity() -> None:
    images = data.digits(binarize="dynamic", dtype=torch.float64).train[:50]
    generator = torch.Generator().manual_seed(0)
    epochs = torch.stack([images.epoch(generator) for _ in range(2000)])
    assert set(epochs.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(epochs[0], epochs[1])
    p = images.images
    # 3,200 pixels, each within 6 standard errors: false alarm below 1e-5 in all.
    assert ((epochs.mean(0) - p).abs() <= 6 * (p * (1 - p) / 2000).sqrt()).all()
    generator.manual_seed(0)
    assert torch.equal(images.epoch(generator), epochs[0])


def test_a_fits_transform_draws_the_first_argument_and_keeps_the_others() -> None:
    images = data.digits(binarize="dynamic").train
    torch.manual_seed(1)
    drawn, labels = images.transform((images.images, images.labels))
    torch.manual_seed(1)
    assert torch.equal(drawn, images.epoch())
    assert labels is images.labels


@pytest.mark.parametrize("binarize", ["static", None])
def test_nothing_is_drawn_where_binarization_is_not_dynamic(binarize: str | None) -> None:
    images = data.digits(binarize=binarize).train
    assert images.epoch() is images.images
    assert images.transform is None


def test_geyser_is_the_published_file() -> None:
    text = importlib.resources.files("lvppl.data").joinpath("geyser.csv").read_bytes()
    assert hashlib.sha256(text).hexdigest() == (
        "ce8f6bd15967c9a3dee345aaf268f6b92623abb1e1d313e04d79b720aa6b8bd6"
    )
    table = data.geyser(dtype=torch.float64)
    assert table.values.shape == (272, 2)
    assert table.columns == ("duration", "waiting")
    # R: colMeans(faithful) = 3.487783, 70.897059; sd = 1.141371, 13.594974.
    mean, sd = torch.tensor([3.487783, 70.897059]), torch.tensor([1.141371, 13.594974])
    torch.testing.assert_close(table.values.mean(0), mean.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(table.values.std(0), sd.double(), rtol=0, atol=1e-5)
    assert table.labels.bincount().tolist() == [100, 172]
    assert table.label_names == ("short", "long")
    assert torch.equal(table.labels == 1, table.column("waiting") > 67)
    with pytest.raises(ProgramError, match="No column 'kind': there are duration, waiting"):
        table.column("kind")


def test_photographs_are_two_of_427_by_640() -> None:
    images = data.photographs(dtype=torch.float64)
    assert images.images.shape == (2, 3, 427, 640)
    assert images.labels is None
    assert images.grey().max() == 255
    for image, original in zip(images.grey(), load_sample_images().images, strict=True):
        assert (image.permute(1, 2, 0).numpy() == original).all()
    sky = images.images[0, :, :50].mean((1, 2))
    assert sky[2] > sky[0]  # red green blue: the sky is blue


@pytest.mark.parametrize(
    ("split", "count", "first"), [("train", 60_000, [5, 0, 4, 1]), ("test", 10_000, [7, 2, 1, 0])]
)
def test_mnist(requires_data: Callable, split: str, count: int, first: list[int]) -> None:
    requires_data("mnist/train-images-idx3-ubyte.gz")
    images = data.mnist(split=split, dtype=torch.float32)
    assert images.images.shape == (count, 28, 28)
    assert images.labels[:4].tolist() == first
    assert images.binarize == "dynamic"
    assert set(images[:20].epoch().unique().tolist()) == {0.0, 1.0}
    # The mean intensities of MNIST as always quoted, to four digits.
    expected = {"train": 0.1307, "test": 0.1325}[split]
    assert float(images.images.double().mean()) == pytest.approx(expected, abs=5e-5)


def test_static_mnist_is_a_draw_of_ours(requires_data: Callable) -> None:
    requires_data("mnist/t10k-images-idx3-ubyte.gz")
    static, grey = (data.mnist(split="test", binarize=b) for b in ("static", None))
    assert set(static.images.unique().tolist()) == {0.0, 1.0}
    p = grey.images.double()
    error = (static.images.double() - p).mean() / ((p * (1 - p)).sum().sqrt() / p.numel())
    assert abs(float(error)) < 4.5
    assert torch.equal(data.mnist(split="test", binarize="static").images, static.images)


def test_mnist_needs_a_known_split() -> None:
    with pytest.raises(ProgramError, match="split must be 'train' or 'test', but is 'valid'"):
        data.mnist(split="valid")


# Files that are found, downloaded and verified, without a network.

CONTENT = bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])


def verified_file() -> VerifiedFile:
    digest = hashlib.sha256(CONTENT).hexdigest()
    return VerifiedFile("toy", "file.gz", digest, ["https://one/", "https://two/"])


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folder that LVPPL_DATA names, and the cache."""
    monkeypatch.setenv("LVPPL_DATA", str(tmp_path / "named"))
    monkeypatch.setattr(pooch, "os_cache", lambda project: str(tmp_path / "cache"))
    for name in ("named", "cache"):
        (tmp_path / name / "toy").mkdir(parents=True)
    return tmp_path / "named" / "toy", tmp_path / "cache" / "toy"


class Web:
    """Stands for the network: what each address answers, and what was asked."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self.answers, self.asked = answers, list[str]()

    def __call__(self, **options: object) -> Callable[[str, str, object], None]:
        def download(address: str, target: str, _: object) -> None:
            self.asked.append(address)
            if address not in self.answers:
                raise ConnectionError("no route to host")
            Path(target).write_bytes(self.answers[address])

        return download


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Web]:
    def install(answers: dict[str, bytes]) -> Web:
        web = Web(answers)
        monkeypatch.setattr(pooch, "HTTPDownloader", web)
        return web

    return install


def test_the_named_folder_comes_before_the_cache(places: tuple[Path, Path], web: Callable) -> None:
    named, cache = places
    offline = web({})
    (cache / "file.gz").write_bytes(b"damaged")
    (named / "file.gz").write_bytes(gzip.compress(CONTENT, 1))  # however it was compressed
    assert verified_file().read() == CONTENT
    (named / "file.gz").unlink()
    (cache / "file.gz").write_bytes(gzip.compress(CONTENT, 9))
    assert verified_file().read() == CONTENT
    assert offline.asked == []


def test_a_wrong_digest_is_an_error_that_says_so(places: tuple[Path, Path]) -> None:
    path = places[0] / "file.gz"
    path.write_bytes(gzip.compress(CONTENT + b"!"))
    with pytest.raises(ProgramError) as caught:
        verified_file().read()
    for part in (str(path), "wrong digest", hashlib.sha256(CONTENT + b"!").hexdigest()):
        assert part in str(caught.value)
    assert path.exists()


@pytest.mark.parametrize("damaged", [b"", b"<html>", gzip.compress(CONTENT, mtime=0)[:-9]])
def test_a_damaged_file_is_named(places: tuple[Path, Path], damaged: bytes) -> None:
    (places[0] / "file.gz").write_bytes(damaged)
    with pytest.raises(ProgramError, match=r"file\.gz (is not a whole gzip|has the wrong digest)"):
        verified_file().read()


def test_a_download_falls_back_and_is_kept(places: tuple[Path, Path], web: Callable) -> None:
    internet = web(
        {
            "https://one/file.gz": gzip.compress(b"something else"),
            "https://two/file.gz": gzip.compress(CONTENT),
        }
    )
    assert verified_file().read() == CONTENT
    assert verified_file().read() == CONTENT
    assert internet.asked == ["https://one/file.gz", "https://two/file.gz"]
    assert [path.name for path in places[1].iterdir()] == ["file.gz"]  # nothing half done is left


def test_without_file_or_network_it_says_what_to_do(
    places: tuple[Path, Path], web: Callable
) -> None:
    web({"https://one/file.gz": gzip.compress(b"something else")})
    with pytest.raises(ProgramError) as caught:
        verified_file().read()
    for part in ("wrong digest", "no route to host", "LVPPL_DATA", "toy/file.gz", str(places[0])):
        assert part in str(caught.value)
    assert list(places[1].iterdir()) == []


def test_idx_files_are_read_and_refused() -> None:
    assert parse_idx(CONTENT).tolist() == [7, 8, 9]
    for content, reason in [
        (b"\x00\x00\x0d\x01" + CONTENT[4:], "must begin with 00 00 08"),
        (CONTENT[:6], "cut short"),
        (CONTENT[:-1], r"says shape \(3,\), but holds 2"),
    ]:
        with pytest.raises(ProgramError, match=reason):
            parse_idx(content)


# The record of images.


def test_images_outside_the_unit_interval_are_named() -> None:
    images = torch.zeros(3, 2, 2)
    for wrong in (1.5, -0.1, float("nan")):
        images[1, 0, 1] = wrong
        with pytest.raises(ProgramError, match=r"image 1 has .* at \(0, 1\)"):
            data.Images(images)


@pytest.mark.parametrize("images", [torch.zeros(3, 2), torch.zeros(3, 2, 2).long()])
def test_images_must_be_floating_and_have_a_height_and_a_width(images: torch.Tensor) -> None:
    with pytest.raises(ProgramError, match=r"\(data, height, width\)"):
        data.Images(images)


def test_images_are_indexed_and_moved_with_their_labels() -> None:
    images = data.Images(torch.rand(5, 2, 2), torch.arange(5))
    some = images[torch.tensor([3, 1])]
    assert some.labels.tolist() == [3, 1]
    assert torch.equal(some.images, images.images[[3, 1]])
    moved = images[1:3].to(dtype=torch.float64)
    assert moved.images.dtype == torch.float64
    assert moved.labels.dtype == torch.int64
    assert len(moved) == 2
    with pytest.raises(ProgramError, match="a slice or a tensor"):
        images[0]
    with pytest.raises(ProgramError, match="5 images, but labels of shape"):
        data.Images(images.images, torch.arange(4))
    with pytest.raises(ProgramError, match="no grid of levels"):
        images.grey()


def test_a_dtype_that_is_not_floating_is_refused() -> None:
    with pytest.raises(ProgramError, match="must be a floating torch dtype"):
        data.geyser(dtype=torch.int64)
