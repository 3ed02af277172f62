"""Samples as a picture."""

import math
import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def to_bytes(x: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """uint8 images: `data_range` onto 0 … 255, rounded, values outside clipped."""
    low, high = data_range
    scaled = (x.float() - low) * (255.0 / (high - low))
    return scaled.round().clamp(0, 255).to(torch.uint8)


def save_grid(
    x: Tensor,
    path: str | os.PathLike[str],
    *,
    data_range: tuple[float, float] = (-1.0, 1.0),
    columns: int | None = None,
    zoom: int = 1,
) -> Path:
    """Writes images [B, C, H, W], C = 1 or 3, as one PNG grid and returns its path.

    The file appears whole or not at all.

    Raises: ValueError for another shape, an empty batch or an ending Pillow doesn't know.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3) or x.numel() == 0:
        raise ValueError(f"x: expected images [B, 1 or 3, H, W], got shape {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    columns = columns or math.ceil(math.sqrt(batch))
    rows = math.ceil(batch / columns)
    gap = 1
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 96)
    for i, image in enumerate(to_bytes(x.detach().cpu(), data_range)):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        sheet[:, top : top + height, left : left + width] = image
    pixels = sheet.to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    picture = Image.fromarray(pixels)
    if zoom > 1:
        size = (picture.width * zoom, picture.height * zoom)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    target = Path(path)
    if target.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"path: {target} does not end like a picture (.png, …)")
    part = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        picture.save(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target
