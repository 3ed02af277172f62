"""Data: digits that come with a package already installed, folders of images, arrays in a file.

Nothing is downloaded, and nothing that a file holds is executed.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sbm_fast.dequantisation import Range, bin_width, check_range
from sbm_fast.process import count

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
_CHANNELS = {"L": "grey", "RGB": "RGB"}


@dataclass(frozen=True, eq=False)
class Digits:
    """Real handwritten digits, 8x8, 17 grey levels -1, -7/8, ..., 1 (background -1).

    train [1498, 1, 8, 8], held_out [299, 1, 8, 8] float32; the labels int64, 0..9.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def digits() -> Digits:
    """The 1797 test images of the UCI "optical recognition of handwritten digits" set (Alpaydin &
    Kaynak 1998), as bundled with scikit-learn; image i is held out when i mod 6 = 5.

    The images stand in the order of their writers, so both parts hold every writer and digit.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits are bundled with scikit-learn, which is not installed here: "
            "pip install scikit-learn"
        ) from error
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    held_out = torch.arange(len(images)) % 6 == 5
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def images(folder: str | os.PathLike[str], size: int | tuple[int, int] | None = None) -> Tensor:
    """The PNG and JPEG images of a folder, in the order of their names.

    Args:
        folder: its files ending in .png, .jpg or .jpeg are read, others and subfolders are not.
        size: (height, width), or one number for both: every image is scaled to it by averaging
            areas, whatever its own size is. None: as they are, all of one size.

    Returns: float32 [N, C, H, W] on the 256 levels of [−1, 1], C = 1 (grey) or 3 (RGB).

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: no image in it; an image that cannot be read, is cut off, or differs from the
            first in size or mode; a mode that is neither 8-bit grey nor RGB. The file is named.
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"folder: there is no {path}")
    if not path.is_dir():
        raise NotADirectoryError(f"folder: expected a folder of images, got the file {path}")
    wanted = _checked_size(size)
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_ENDINGS and f.is_file())
    if not files:
        raise ValueError(
            f"folder: expected images ({', '.join(IMAGE_ENDINGS)}) in {path}, got none"
        )
    pixels: list[np.ndarray] = []
    for file in files:
        array = _read_image(file, wanted)
        if pixels and array.shape != pixels[0].shape:
            raise ValueError(
                f"folder: expected images all alike, {files[0]} is {_kind(pixels[0])}, "
                f"{file} is {_kind(array)}"
            )
        pixels.append(array)
    return torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if not isinstance(size, tuple):
        return count("size", size), count("size", size)
    if len(size) != 2:
        raise ValueError(f"size: expected (height, width) or one number, got {size!r}")
    return count("size", size[0]), count("size", size[1])


def _read_image(file: Path, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [C, H, W]."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            mode = image.mode
            array = _pixels(image, size) if mode in _CHANNELS else None
    # Pillow raises a plain Exception for pictures of suspicious size, SyntaxError for broken PNGs.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"folder: {file} cannot be read as an image ({_said(error)})") from error
    if array is None:
        raise ValueError(
            f"folder: expected images of mode L (8-bit grey) or RGB, {file} has {mode}; convert it"
        )
    return array


def _pixels(image: Image, size: tuple[int, int] | None) -> np.ndarray:
    from PIL import Image as pillow

    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), pillow.Resampling.BOX)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _kind(array: np.ndarray) -> str:
    channels, height, width = array.shape
    return f"{height}x{width} {'grey' if channels == 1 else 'RGB'}"


def arrays(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    data_range: Range = (-1.0, 1.0),
    levels: int = 256,
) -> Tensor:
    """One array of an .npz file as data [N, …].

    uint8 values are numbers of levels: k becomes lo + kΔ, Δ = (hi − lo)/(levels − 1). Floating
    values are taken as they are; that they lie on levels is for those to ask who need it. The order
    of the dimensions is yours to get right: a network of this package takes [N, C, H, W], and
    nothing is transposed here.

    Args:
        path: the file.
        name: of the array in it; None: the only one.
        data_range, levels: what uint8 is scaled to.

    Returns: float32 [N, …]; float64 for float64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .npz file, or cut off; the array is not there, not named among several,
            empty, of another dtype (object arrays would be unpickled and are refused), holds values
            that are not finite, or numbers beyond the levels. The file and the array are named.
    """
    low, _ = check_range(data_range)
    width = bin_width(data_range, levels)
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path: there is no file {file}")
    key, array = _read_array(file, name)
    where = f"path: {key!r} in {file}"
    if array.ndim < 2 or array.size == 0:
        raise ValueError(f"{where}: expected data [N, …] of at least one, got shape {array.shape}")
    if array.dtype == np.uint8:
        if array.max() >= levels:
            raise ValueError(
                f"{where}: expected levels 0 … {levels - 1} (levels={levels}), got {array.max()}"
            )
        return (low + width * torch.from_numpy(array).double()).float()
    if array.dtype.kind != "f":
        raise ValueError(f"{where}: expected uint8 or floating values, got {array.dtype}")
    if not np.isfinite(array).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{where}: expected finite values, got {array[first]} at index {first}")
    wide = array.dtype.itemsize >= 8
    return torch.from_numpy(np.ascontiguousarray(array, np.float64 if wide else np.float32))


_BROKEN = (
    OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error,
    NotImplementedError, RuntimeError,  # other compressions, encryption
)  # fmt: skip
"""What numpy and zipfile raise at files that are damaged, or not what they claim to be."""


def _read_array(file: Path, name: str | None) -> tuple[str, np.ndarray]:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"path: {file} is no .npz file, or cut off")
    try:
        with np.load(file, allow_pickle=False) as content:
            names = list(content.files)
            if name is None and len(names) == 1:
                name = names[0]
            array = content[name] if name in names else None
    except _BROKEN as error:
        raise ValueError(
            f"path: {file} cannot be read ({error or type(error).__name__})"
        ) from error
    if name is None:
        raise ValueError(f"name: expected one of {names} in {file}, got None")
    if not isinstance(array, np.ndarray):
        raise ValueError(f"name: expected one of the arrays {names} in {file}, got {name!r}")
    return name, array


def _said(error: BaseException) -> str:
    """One line of what a library said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
