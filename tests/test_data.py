"""Images of a folder and arrays of a file, whole, broken and hostile."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sbm_fast import data
from sbm_fast.dequantisation import check_levels, level_index

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (3, 6, 4), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (3, 6, 4, 3), dtype=np.uint8)


def save(folder: Path, arrays: np.ndarray, names: list[str]) -> None:
    for array, name in zip(arrays, names, strict=True):
        Image.fromarray(array).save(folder / name)


@pytest.mark.parametrize(("arrays", "channels"), [(GREY, 1), (COLOUR, 3)])
def test_images_come_in_the_order_of_their_names(
    tmp_path: Path, arrays: np.ndarray, channels: int
) -> None:
    save(tmp_path, arrays, ["b.png", "a.PNG", "c.png"])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "sub.png").mkdir()
    x = data.images(tmp_path)
    assert x.dtype == torch.float32 and tuple(x.shape) == (3, channels, 6, 4)
    check_levels(x, (-1, 1), 256)
    expected = arrays[[1, 0, 2]].reshape(3, 6, 4, channels).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(level_index(x, (-1, 1), 256).numpy(), expected)


def test_jpegs_are_read(tmp_path: Path) -> None:
    flat = np.full((2, 8, 8, 3), 128, dtype=np.uint8)
    save(tmp_path, flat, ["a.jpg", "b.JPEG"])
    x = data.images(str(tmp_path))
    assert (x - (128 / 127.5 - 1)).abs().max() < 0.02


def test_images_are_scaled_by_areas(tmp_path: Path) -> None:
    big = np.zeros((4, 8), dtype=np.uint8)
    big[:, 4:] = 200
    save(tmp_path, GREY[:1].repeat(2, 1).repeat(2, 2), ["a.png"])
    Image.fromarray(big).save(tmp_path / "b.png")
    x = data.images(tmp_path, size=(2, 4))
    assert tuple(x.shape) == (2, 1, 2, 4)
    index = level_index(x, (-1, 1), 256)
    assert index[1, 0].tolist() == [[0, 0, 200, 200]] * 2
    assert data.images(tmp_path, size=3).shape == (2, 1, 3, 3)


def refused_folder(folder: Path, message: str, size: Any = None) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        data.images(folder, size)
    assert "\n" not in str(caught.value)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^folder: there is no .*absent"):
        data.images(tmp_path / "absent")
    refused_folder(tmp_path, r"^folder: expected images \(.png, .jpg, .jpeg\) in .*, got none")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"^folder: expected a folder of images"):
        data.images(tmp_path / "file")


def test_images_that_differ_are_named(tmp_path: Path) -> None:
    save(tmp_path, GREY[:1], ["a.png"])
    Image.fromarray(GREY[0, :5]).save(tmp_path / "b.png")
    refused_folder(tmp_path, r"^folder: .*a\.png is 6x4 grey, .*b\.png is 5x4 grey")
    Image.fromarray(COLOUR[0]).save(tmp_path / "b.png")
    refused_folder(tmp_path, r"^folder: .*a\.png is 6x4 grey, .*b\.png is 6x4 RGB")


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "LA", "I;16"])
def test_other_modes_are_refused(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(GREY[0].astype(np.uint16) * 256)
    else:
        picture = Image.fromarray(COLOUR[0]).convert(mode)
    picture.save(tmp_path / "x.png")
    refused_folder(tmp_path, rf"^folder: expected images of mode L .* or RGB, .*x\.png has {mode};")


@pytest.mark.parametrize("size", [0, -1, (3,), (1, 2, 3), (4, 0)])
def test_bad_sizes(tmp_path: Path, size: Any) -> None:
    refused_folder(tmp_path, r"^size: ", size)
    with pytest.raises(TypeError, match=r"^size: "):
        data.images(tmp_path, 2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_broken_images_are_named(tmp_path: Path, name: str) -> None:
    """Cut off anywhere, or with any byte changed, a file is read or refused by name."""
    file = tmp_path / name
    Image.fromarray(COLOUR[0]).save(file)
    whole = file.read_bytes()
    refused = 0
    for cut in range(0, len(whole) - 30, max(1, len(whole) // 40)):
        file.write_bytes(whole[:cut])
        refused_folder(tmp_path, rf"^folder: .*{name} cannot be read as an image")
    for at in range(0, len(whole), max(1, len(whole) // 150)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            data.images(tmp_path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("folder: ")
    assert refused
    file.write_bytes(b"<svg/>")
    refused_folder(tmp_path, "cannot be read as an image")


def test_pictures_of_suspicious_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, GREY[:1], ["x.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    refused_folder(tmp_path, r"^folder: .*x\.png cannot be read .*bomb")


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def test_bytes_are_scaled_to_the_range(tmp_path: Path) -> None:
    byte = RNG.integers(0, 256, (5, 3, 4, 4), dtype=np.uint8)
    path = npz(tmp_path, x=byte)
    for data_range in ((-1, 1), (0, 1), (0, 255)):
        x = data.arrays(path, data_range=data_range)
        assert x.dtype == torch.float32 and x.shape == byte.shape
        check_levels(x, data_range, 256)
        np.testing.assert_array_equal(level_index(x, data_range, 256).numpy(), byte)
    few = npz(tmp_path, x=byte // 16)
    assert float(data.arrays(few, levels=17).max()) == 15 / 8 - 1
    with pytest.raises(ValueError, match=r"'x' in .*x\.npz: expected levels 0 … 14 .*got 15"):
        data.arrays(few, levels=15)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8"])
def test_floating_values_are_taken_as_they_are(tmp_path: Path, dtype: str) -> None:
    values = RNG.standard_normal((4, 2, 3)).astype(dtype)
    for order in (values, np.asfortranarray(values)):
        x = data.arrays(npz(tmp_path, x=order))
        assert x.dtype == (torch.float64 if "8" in dtype else torch.float32)
        np.testing.assert_array_equal(x.numpy(), values.astype(x.numpy().dtype))


def test_arrays_by_name(tmp_path: Path) -> None:
    path = npz(tmp_path, a=np.zeros((2, 3)), b=np.ones((2, 3)))
    assert float(data.arrays(path, "b").mean()) == 1.0
    with pytest.raises(ValueError, match=r"^name: expected one of \['a', 'b'\] in .*, got None"):
        data.arrays(path)
    with pytest.raises(ValueError, match=r"^name: expected one of the arrays .*, got 'c'"):
        data.arrays(path, "c")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 3)), r"expected data \[N, …\] of at least one, got shape \(0, 3\)"),
        (np.zeros(3), r"expected data \[N, …\]"),
        (np.float64(3.0), r"expected data \[N, …\]"),
        (np.zeros((2, 2), dtype=np.int64), "expected uint8 or floating values, got int64"),
        (np.zeros((2, 2), dtype=bool), "expected uint8 or floating values, got bool"),
        (np.zeros((2, 2), dtype=complex), "expected uint8 or floating values, got complex128"),
        (np.array([["a", "b"]]), "expected uint8 or floating values, got <U1"),
        (np.array([[0, np.nan]]), r"expected finite values, got nan at index \(0, 1\)"),
        (np.array([[0.0], [np.inf]]), r"expected finite values, got inf at index \(1, 0\)"),
    ],
)
def test_arrays_that_are_no_data(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^path: 'x' in .*x\.npz: {message}"):
        data.arrays(npz(tmp_path, x=array))


class Executed:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Executed, "ran", True)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    evil = np.empty((1, 1), dtype=object)
    evil[0, 0] = Executed()
    with pytest.raises(ValueError, match=r"^path: .* cannot be read \(Object arrays cannot be"):
        data.arrays(npz(tmp_path, x=evil))
    np.save(tmp_path / "y.npz.npy", evil)
    (tmp_path / "y.npz.npy").rename(tmp_path / "y.npz")
    with pytest.raises(ValueError, match=r"^path: .*y\.npz is no \.npz file"):
        data.arrays(tmp_path / "y.npz")
    assert not Executed.ran


def test_missing_broken_and_false_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^path: there is no file .*absent\.npz"):
        data.arrays(tmp_path / "absent.npz")
    with pytest.raises(FileNotFoundError, match=r"^path: there is no file"):
        data.arrays(tmp_path)
    path = tmp_path / "x.npz"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is no \.npz file"):
        data.arrays(path)
    for compressed in (False, True):
        write = np.savez_compressed if compressed else np.savez
        write(path, x=RNG.standard_normal((4, 8)))
        whole = path.read_bytes()
        for cut in range(0, len(whole) - 1, 17):
            path.write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=r"^path: "):
                data.arrays(path)
        for at in range(0, len(whole), 3):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
            try:
                data.arrays(path)
            except ValueError as error:
                assert str(error).startswith(("path: ", "name: ")), error


def test_false_headers(tmp_path: Path) -> None:
    """Members that are no arrays, and a header that claims more than the file holds."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", b"not an array")
    with pytest.raises(ValueError, match=r"^name: expected one of the arrays \['x'\]"):
        data.arrays(path)
    header = io.BytesIO()
    shape = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6, 10**4)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", header.getvalue() + b"\0" * 64)
    with pytest.raises(ValueError, match=r"^path: .*x\.npz cannot be read"):
        data.arrays(path)
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(ValueError, match=r"^name: expected one of \[\]"):
        data.arrays(path)
