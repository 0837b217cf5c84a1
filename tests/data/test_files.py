"""Files of the user's: what is read, and the sentence for each that is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lvppl.data import load
from lvppl.errors import ProgramError


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


# Arrays


def test_npy_round_trip(tmp_path: Path) -> None:
    values = np.random.RandomState(0).randn(5, 3, 2)
    np.save(tmp_path / "a.npy", values)
    loaded = load(tmp_path / "a.npy", dtype=torch.float64)
    assert torch.equal(loaded.values, torch.from_numpy(values))
    assert (loaded.columns, loaded.files, len(loaded)) == ((), (), 5)
    assert load(str(tmp_path / "a.npy")).values.dtype == torch.get_default_dtype()


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.arange(6, dtype=np.uint8), torch.int64),
        (np.arange(6, dtype=">i4"), torch.int64),
        (np.arange(6, dtype=">f4"), torch.float32),
        (np.arange(6) > 2, torch.float32),
        (np.arange(6, dtype=np.float16), torch.float32),
    ],
)
def test_kinds_of_numbers(tmp_path: Path, stored: np.ndarray, expected: torch.dtype) -> None:
    np.save(tmp_path / "a.npy", stored)
    values = load(tmp_path / "a.npy").values
    assert values.dtype == expected
    assert values.tolist() == stored.astype(float).tolist()
    assert load(tmp_path / "a.npy", dtype=torch.float64).values.dtype == torch.float64


def test_npz_of_one_array_and_of_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=np.arange(3))
    assert load(tmp_path / "one.npz").values.tolist() == [0, 1, 2]
    np.savez(tmp_path / "two.npz", x=np.arange(3), y=np.ones(2))
    assert load(tmp_path / "two.npz", array="y").values.tolist() == [1, 1]
    with pytest.raises(ProgramError, match=r"two\.npz holds x, y: say which with array="):
        load(tmp_path / "two.npz")
    with pytest.raises(ProgramError, match="holds no array 'z': it holds x, y"):
        load(tmp_path / "two.npz", array="z")


BAD_ARRAYS = {
    "objects": (np.array([{}, 1], dtype=object), "cannot be read as an array of numbers"),
    "text": (np.array(["a", "b"]), "expected real numbers, integers or booleans"),
    "complex": (np.array([1j]), "complex128 values"),
    "a scalar": (np.array(3.0), "without a data dimension"),
    "nothing": (np.zeros((0, 3)), r"holds no data: its shape is \(0, 3\)"),
    "too large": (np.array([2**63], dtype=np.uint64), "9223372036854775808, which is too large"),
    "too large for float32": (np.array([1e300]), "1e\\+300, too large for torch.float32"),
    "NaN": (np.array([[0, 1], [np.nan, np.nan]]), "NaN .* at row 2, column 1, and 1 more"),
    "NaN deeper": (np.where(np.arange(8) == 5, np.nan, 0).reshape(2, 2, 2), r"index \[1, 0, 1\]"),
    "infinity": (np.array([0, -np.inf]), r"-inf at index \[1\]: mend the file"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_bad_array_is_refused(case: str, tmp_path: Path) -> None:
    array, reason = BAD_ARRAYS[case]
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ProgramError, match=reason) as caught:
        load(tmp_path / "a.npy", dtype=torch.float32 if array.dtype.kind == "f" else None)
    assert "a.npy" in str(caught.value)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"not an array", b"PK\x03\x04cut", b"\x93NUMPY\x01"])
def test_a_damaged_array_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ProgramError, match=f"{name} cannot be read as an array of numbers"):
        load(tmp_path / name)


def test_missing_values_are_let_through_when_asked_but_infinity_never(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1.0, np.nan]))
    values = load(tmp_path / "a.npy", allow_missing=True).values
    assert values.isnan().tolist() == [False, True]
    np.save(tmp_path / "a.npy", np.array([np.nan, np.inf]))
    with pytest.raises(ProgramError, match=r"inf at index \[1\]"):
        load(tmp_path / "a.npy", allow_missing=True)


# Tables


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a,b\n1,2\n3,4\n", ("a", "b")),
        ("1,2\n3,4", ("0", "1")),
        ('\ufeff"a", "b"\r\n 1 ,+2.0\r\n\r\n3e0,.4e1\r\n', ("a", "b")),
    ],
)
def test_csv_with_and_without_a_header(write, text: str, columns: tuple[str, ...]) -> None:
    loaded = load(write("t.csv", text))
    assert loaded.columns == columns
    assert loaded.values.tolist() == [[1, 2], [3, 4]]


def test_csv_columns_are_chosen_by_name_and_in_order(write) -> None:
    path = write("t.csv", "a,kind,b\n1,long,2\n3,short,4\n")
    loaded = load(path, columns=["b", "a"], dtype=torch.float64)
    assert loaded.columns == ("b", "a")
    assert loaded.values.tolist() == [[2, 1], [4, 3]]
    assert load(write("n.csv", "2019,2020\n1,2\n"), header=True).columns == ("2019", "2020")
    assert load(write("s.csv", "a;b\n1;2\n"), delimiter=";").values.tolist() == [[1, 2]]


BAD_TABLES = {
    "a word": ("a,b\n1,2\n3,long\n", {}, r"column 'b', row 2 \(line 3\): 'long' is not a number"),
    "a word in the first row": ("1,x\n3,4\n", {}, r"column '1', row 1 .* pass header=True"),
    "an underscore": ("1_000\n", {"header": False}, "'1_000' is not a number"),
    "a decimal comma": ("a;b\n1,5;2\n", {"delimiter": ";"}, "column 'a', row 1.*'1,5' is not"),
    "a short row": ("a,b\n1,2\n\n3\n", {}, r"row 2 \(line 4\) has 1 cells, but there are 2"),
    "nothing": ("\n\n", {}, "is empty"),
    "only names": ("a,b\n", {}, r"names \(a, b\) but no rows"),
    "an unknown column": ("a,b\n1,2\n", {"columns": ["c"]}, "no column named 'c': it has a, b"),
    "a doubled column": ("a,a\n1,2\n", {}, "more than one column named 'a'"),
    "a name for a list": ("ab,b\n1,2\n", {"columns": "b"}, r"must be a list of names.*\['b'\]"),
    "an empty cell": ("a,b\n1,2\n3,\n", {}, "NaN .missing. at row 2, column 'b'"),
    "a marked cell": ("a,b\n1,2\nNA,?\n", {}, "NaN .missing. at row 2, column 'a', and 1 more"),
    "infinity": ("a,b\n1,2\n3,inf\n", {}, "inf at row 2, column 'b'"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_refused(case: str, write) -> None:
    text, options, reason = BAD_TABLES[case]
    with pytest.raises(ProgramError, match=reason) as caught:
        load(write("t.csv", text), **options)
    assert "t.csv" in str(caught.value) or "columns must" in str(caught.value)


def test_missing_cells_become_nan_when_asked(write) -> None:
    values = load(write("t.csv", "a,b\n1,\nNaN,4\n"), allow_missing=True).values
    assert values.isnan().tolist() == [[False, True], [True, False]]


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("größe\n1\n".encode("latin-1"))
    with pytest.raises(ProgramError, match=r"t\.csv is not UTF-8 text"):
        load(tmp_path / "t.csv")


# Folders of images


def save_image(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def test_grey_images_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (2, 4, 6), dtype=np.uint8)
    save_image(tmp_path / "b.png", pixels[1])
    save_image(tmp_path / "a.PNG", pixels[0])
    (tmp_path / "notes.txt").write_text("left alone")
    loaded = load(tmp_path, dtype=torch.float64)
    assert loaded.files == ("a.PNG", "b.png")
    assert torch.equal(loaded.values, torch.from_numpy(pixels / 255))


def test_colour_images_have_their_channels_first(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (4, 6, 3), dtype=np.uint8)
    save_image(tmp_path / "a.png", pixels)
    loaded = load(tmp_path, dtype=torch.float64).values
    assert torch.equal(loaded[0], torch.from_numpy(pixels.transpose(2, 0, 1) / 255))


def test_kinds_of_grey_and_colour(tmp_path: Path) -> None:
    """Each kind of file holds the same picture, at its own precision."""
    grey = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    save_image(tmp_path / "bits.png", grey, "1")
    save_image(tmp_path / "deep.png", grey.astype(np.uint16) * 257)
    save_image(tmp_path / "grey.png", grey)
    opaque = np.stack([grey, np.full_like(grey, 255)], axis=-1)
    Image.fromarray(opaque, "LA").save(tmp_path / "opaque.png")
    assert torch.equal(load(tmp_path).values, expected.expand(4, 2, 2))
    for path in tmp_path.iterdir():
        path.unlink()
    save_image(tmp_path / "palette.png", np.stack([grey] * 3, axis=-1), "P")
    save_image(tmp_path / "photo.jpg", np.full((2, 2, 3), 255, dtype=np.uint8))
    values = load(tmp_path).values
    assert torch.equal(values[0], expected.expand(3, 2, 2))
    assert torch.equal(values[1], torch.ones(3, 2, 2))


def test_the_cameras_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16), dtype=np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    values = load(tmp_path).values
    assert values.shape == (1, 16, 8)
    assert torch.equal(values[0], torch.from_numpy(np.rot90(pixels, -1).copy() / 255).float())


def test_images_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", np.zeros((4, 6), dtype=np.uint8))
    save_image(tmp_path / "b.png", np.zeros((4, 7), dtype=np.uint8))
    with pytest.raises(ProgramError, match=r"b\.png is grey, 7 x 4 .* but a\.png is grey, 6 x 4"):
        load(tmp_path)
    save_image(tmp_path / "b.png", np.zeros((4, 6, 3), dtype=np.uint8))
    with pytest.raises(ProgramError, match=r"b\.png is colour, 6 x 4 pixels, but a\.png is grey"):
        load(tmp_path)


def test_transparent_damaged_and_foreign_images_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", np.full((2, 2, 4), 128, dtype=np.uint8))
    with pytest.raises(ProgramError, match=r"a\.png is transparent in places"):
        load(tmp_path)
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(ProgramError, match=r"a\.png cannot be read as an image"):
        load(tmp_path)
    save_image(tmp_path / "b.png", np.random.RandomState(0).randint(0, 255, (64, 64)).astype("u1"))
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes()[:1000])
    with pytest.raises(ProgramError, match=r"a\.png cannot be read as an image"):
        load(tmp_path)
    (tmp_path / "a.png").unlink()
    Image.new("CMYK", (64, 64)).save(tmp_path / "a.jpg")
    with pytest.raises(ProgramError, match=r"a\.jpg has colour mode CMYK"):
        load(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"holds no images: expected files \.png, \.jpg, \.jpeg"):
        load(tmp_path)


# Paths and options


def test_what_cannot_be_loaded_at_all(tmp_path: Path, write) -> None:
    with pytest.raises(ProgramError, match=r"gone\.csv is not there"):
        load(tmp_path / "gone.csv")
    with pytest.raises(ProgramError, match=r"of kind \.xlsx: expected \.npy, \.npz, \.csv"):
        load(write("a.xlsx", ""))
    with pytest.raises(ProgramError, match="of kind without a suffix"):
        load(write("a", ""))


def test_an_option_of_another_kind_of_file_is_refused(write) -> None:
    path = write("t.csv", "1\n")
    with pytest.raises(ProgramError, match=r"array= is for \.npz files, but t\.csv is a \.csv"):
        load(path, array="x")
    with pytest.raises(ProgramError, match=r"columns= is for \.csv files"):
        load(path.parent, columns=["a"])
