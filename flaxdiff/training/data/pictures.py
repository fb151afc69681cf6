"""From whatever a data set stores of a picture to upright RGB, and from there to the size that a network trains at.

A picture may be a file, bytes, a Pillow image or an array; grey, of 16 bits, with a palette, in CMYK, transparent, or
turned by its EXIF tag. Files are hostile until they have been decoded: only plain raster formats are opened, sizes are
checked before pixels are unpacked, and whatever goes wrong is a `BadExample`.
"""

import contextlib
import functools
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from flaxdiff.images import LARGEST
from flaxdiff.training.data.faults import BadExample

# Plain raster formats: Pillow hands others, such as EPS, to programs of the system.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif")
SMALLEST = 8  # pixels on a side: what has fewer shows nothing
NARROWEST = 16  # how many times as long as wide: a line of pixels made wide would fill the memory
MODES = {mode.name.lower(): mode for mode in Image.Resampling}

Size = tuple[int, int]  # height, width, in pixels


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def opened(picture: Any) -> Iterator[Image.Image]:
    """A picture whose header has been read and found usable, its pixels not yet; a file is open inside the `with`.

    Args:
      picture: a file, its bytes, an array [H, W] or [H, W, 1, 3 or 4] of uint8, or Pillow's.

    Raises:
      BadExample: there is none, it is too large or too small, or in no format that is read here.

    >>> with opened(np.zeros((8, 9, 3), np.uint8)) as image:
    ...     image.size
    (9, 8)
    """
    with contextlib.ExitStack() as files:
        image = _image(picture, files)
        width, height = image.size
        if min(width, height) < SMALLEST:
            raise BadExample(f"smaller than {SMALLEST} pixels")
        if max(width, height) > NARROWEST * min(width, height):
            raise BadExample(f"more than {NARROWEST} times as long as wide")
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise BadExample("of too many pixels")
        yield image


def _image(picture: Any, files: contextlib.ExitStack) -> Image.Image:
    """Pillow's object for whatever a picture is; it may read a file that `files` will close."""
    if isinstance(picture, Image.Image):
        return picture
    if picture is None:
        raise BadExample("without a picture")
    try:
        if isinstance(picture, np.ndarray):
            return Image.fromarray(picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture)
        if not isinstance(picture, Path | bytes):
            raise BadExample(f"not a picture but {type(picture).__name__}")
        file = files.enter_context(open(picture, "rb") if isinstance(picture, Path) else io.BytesIO(picture))
        if file.seek(0, 2) > LARGEST:
            raise BadExample(f"larger than {LARGEST >> 20} MiB")
        file.seek(0)
        return Image.open(file, formats=_formats())
    except BadExample:
        raise
    except FileNotFoundError:
        raise BadExample("a missing file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadExample("of too many pixels") from None
    except Exception as error:  # a decoder given arbitrary bytes may raise anything
        raise BadExample("not a picture that can be read") from error


def decode(picture: Any) -> Image.Image:
    """A picture as upright RGB: turned by its EXIF tag, 16 bits brought to 8, what is transparent laid over white.

    Args:
      picture: as of `opened`.

    Raises:
      BadExample: it cannot be decoded, or as of `opened`.

    >>> decode(Image.new("LA", (8, 8), (0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    with opened(picture) as image, _decoding():
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # Pillow would cut these off at 255
            return _deep(image).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Whatever goes wrong inside is the picture's fault."""
    try:
        yield
    except Exception as error:  # a decoder given arbitrary bytes may raise anything
        raise BadExample("a picture that cannot be decoded") from error


def _deep(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits with 8: whole numbers up to 65535, or reals up to 1."""
    numbers, white = np.asarray(image, np.float64), 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(numbers).all():
        raise ValueError("infinite or not a number")
    return Image.fromarray((numbers / white * 255).round().clip(0, 255).astype(np.uint8))


def size_of(picture: Any) -> Size:
    """(height, width) of a picture once it is upright, from its header.

    Raises:
      BadExample: as of `opened`.

    >>> size_of(Image.new("L", (9, 8)))
    (8, 9)
    """
    with opened(picture) as image, _decoding():
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


class Cut(NamedTuple):
    """Which part of a picture to take, for all the pictures of an example alike.

    Attributes:
      across, down: how far from the left and the top, as shares in [0, 1) of the places there are; None for the middle.
      flip: left to right, before the part is taken.
    """

    across: float | None = None
    down: float | None = None
    flip: bool = False


def covering(image: Size, size: Size) -> Size:
    """The size, of a picture's proportions, that covers another and is the same along one side.

    >>> covering((300, 400), (64, 64)), covering((300, 400), (64, 128))
    ((64, 85), (96, 128))
    """
    (height, width), (down, across) = image, size
    if height * across > width * down:
        return max(across * height // width, down), across
    return down, max(down * width // height, across)


def fit(image: Image.Image, size: Size, cut: Cut, image_interpolation_mode: str = "lanczos") -> tuple[np.ndarray, Size]:
    """Resize a picture so that it covers a size, flip it, and cut that size out of it.

    Args:
      image: in RGB.
      size: (height, width) to make.
      cut: which part.
      image_interpolation_mode: nearest, box, bilinear, hamming, bicubic or lanczos.

    Returns:
      float32 [H, W, 3] in [-1, 1], and (top, left) of the part in the resized and flipped picture.

    >>> pixels, corner = fit(Image.new("RGB", (400, 300), "white"), (64, 64), Cut())
    >>> pixels.shape, corner, float(pixels.min())
    ((64, 64, 3), (0, 10), 1.0)
    """
    down, across = covering((image.height, image.width), size)
    image = image.resize((across, down), MODES[image_interpolation_mode])
    if cut.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left = _corner(down - size[0], cut.down), _corner(across - size[1], cut.across)
    image = image.crop((left, top, left + size[1], top + size[0]))
    return np.asarray(image, np.float32) / np.float32(127.5) - 1, (top, left)


def _corner(room: int, share: float | None) -> int:
    """Where a part begins, of the places from 0 to `room`."""
    return round(room / 2) if share is None else math.floor(share * (room + 1))
