"""Pictures between Pillow and arrays: channels-last, float in [0, 1] outside and [-1, 1] inside the networks."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Arrays [B, H, W, 1 or 3] in [0, 1] as pictures.

    >>> to_pil(np.zeros((2, 8, 8, 3)))[0].size
    (8, 8)
    """
    pixels = (np.asarray(images, np.float32) * 255).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def to_array(images: Image.Image | np.ndarray | Sequence, height: int | None = None, width: int | None = None):
    """Pictures as float32 [B, H, W, 3] in [-1, 1], resized where a size is given.

    Args:
      images: one picture or several: Pillow's, or arrays [H, W, 3] or [B, H, W, 3] of floats in [0, 1].
      height, width: in pixels.

    Raises:
      ValueError: something that is not a picture.

    >>> to_array(Image.new("RGB", (4, 2), "white")).shape
    (1, 2, 4, 3)
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Sequence) and images and all(isinstance(i, Image.Image) for i in images):
        size = (width or images[0].width, height or images[0].height)
        images = [np.asarray(i.convert("RGB").resize(size, Image.Resampling.LANCZOS), np.float32) / 255 for i in images]
    array = np.asarray(images, np.float32)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4:
        raise ValueError(f"Expected pictures [B, H, W, C] or Pillow images, got an array of shape {array.shape}.")
    return 2 * array - 1


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images: Image.Image | np.ndarray | Sequence, size: int = 224) -> np.ndarray:
    """Pictures as CLIP's image encoders read them, float32 [B, S, S, 3].

    The shorter side is brought to `size`, the middle is cut out, and each channel normalised.

    Args:
      images: one picture or several: Pillow's, or arrays [H, W, 3] or [B, H, W, 3] of floats in [0, 1].
      size: side in pixels.

    >>> clip_pixels(Image.new("RGB", (400, 300), "white")).shape
    (1, 224, 224, 3)
    """
    if isinstance(images, np.ndarray) or hasattr(images, "ndim"):
        images = to_pil(images if images.ndim == 4 else images[None])
    cut = []
    for image in [images] if isinstance(images, Image.Image) else images:
        scale = size / min(image.size)
        width, height = (max(int(side * scale), size) for side in image.size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        cut.append(np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / 255)
    return ((np.stack(cut) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).astype(np.float32)


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Pictures side by side, row after row, on one sheet.

    Args:
      images: rows · cols of them, of one size.
      rows, cols: of the sheet.
      resize: side in pixels to bring each to first.

    Raises:
      ValueError: the number of pictures is not rows · cols.

    >>> make_image_grid([Image.new("RGB", (4, 4))] * 6, rows=2, cols=3).size
    (12, 8)
    """
    if len(images) != rows * cols:
        raise ValueError(f"{len(images)} pictures do not fill {rows} rows of {cols}; change rows or cols.")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    sheet = Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % cols * width, i // cols * height))
    return sheet
