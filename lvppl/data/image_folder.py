"""A folder of images of one size, as one tensor of intensities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lvppl.errors import ProgramError

__all__ = ["read_image_folder"]

_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_image_folder(folder: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Intensities float64 in [0, 1], (data, height, width) or (data, 3, height, width), and names.

    The images are in the order of their names. Grey images of 8 and 16 bits, black and white,
    colour and palettes are read; the camera's orientation is applied. Subfolders and other files
    are left alone.

    :raises ProgramError: where there is no image; where one cannot be read, is transparent, or
        differs from the first in size or in colour: the file is named.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise ProgramError(f"{folder} holds no images: expected files {', '.join(_SUFFIXES)}.")
    images = [_read(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise ProgramError(
                f"{path.name} is {_described(image)}, but {paths[0].name} is "
                f"{_described(images[0])}: crop or convert the images to one size and kind first."
            )
    return np.stack(images), tuple(path.name for path in paths)


def _read(path: Path) -> np.ndarray:
    """(height, width) or (3, height, width)."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ProgramError(f"{path.name} cannot be read as an image: {error}.") from error
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow holds as "I;16" or as "I"
        return np.asarray(image).astype(np.float64) / 65535
    if image.mode == "1":
        return np.asarray(image).astype(np.float64)
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise ProgramError(
                f"{path.name} is transparent in places, and what shows through is not in the file: "
                "paste it on a background first."
            )
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if image.mode not in ("L", "RGB"):
        raise ProgramError(f"{path.name} has colour mode {image.mode}: convert it to grey or RGB.")
    pixels = np.asarray(image).astype(np.float64) / 255
    return pixels if image.mode == "L" else pixels.transpose(2, 0, 1)


def _described(image: np.ndarray) -> str:
    return (
        f"{'grey' if image.ndim == 2 else 'colour'}, {image.shape[-1]} x {image.shape[-2]} pixels"
    )
