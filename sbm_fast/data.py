"""Data sets that come with a package already installed: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
