"""Pictures between Pillow and arrays: channels-last, float in [0, 1] outside and [-1, 1] inside the networks."""

import io
import os
import urllib.request
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter, ImageOps

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
LARGEST = 64 << 20  # bytes of a picture from elsewhere


def load_image(image: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """A picture from a file or an address (http, https), upright and in RGB.

    Raises:
      ValueError: there is none, it cannot be read, or it is larger than `LARGEST` bytes.

    >>> load_image(Image.new("L", (8, 8))).mode
    'RGB'
    """
    source = image
    try:
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            with urllib.request.urlopen(source, timeout=30) as answer:
                source = io.BytesIO(answer.read(LARGEST + 1))
            if source.getbuffer().nbytes > LARGEST:
                raise ValueError(f"more than {LARGEST >> 20} MiB")
        opened = source if isinstance(source, Image.Image) else Image.open(source)
        return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{image} is no picture that can be read ({error}); give a file, or its address.") from error


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Arrays [B, H, W, 1 or 3] in [0, 1] as pictures.

    >>> to_pil(np.zeros((2, 8, 8, 3)))[0].size
    (8, 8)
    """
    pixels = (np.asarray(images, np.float32) * 255).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def to_array(
    images: Image.Image | np.ndarray | Sequence,
    height: int | None = None,
    width: int | None = None,
    box: Box | None = None,
) -> np.ndarray:
    """Pictures as float32 [B, H, W, 3] in [-1, 1], resized where a size is given.

    Args:
      images: one picture or several: Pillow's, or arrays [H, W, 3] or [B, H, W, 3] of floats in [0, 1].
      height, width: in pixels. Pillow's pictures are resampled, of arrays the nearest pixels are taken.
      box: the part of Pillow's pictures to take; it keeps its proportions, see `fitted`.

    Raises:
      ValueError: something that is not a picture.

    >>> to_array(Image.new("RGB", (4, 2), "white")).shape
    (1, 2, 4, 3)
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Sequence) and images and all(isinstance(i, Image.Image) for i in images):
        size = (width or images[0].width, height or images[0].height)
        images = np.stack([_pixels(image.convert("RGB"), size, box) for image in images])
    array = np.asarray(images, np.float32)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4:
        raise ValueError(f"Expected pictures [B, H, W, C] or Pillow images, got an array of shape {array.shape}.")
    return 2 * nearest(array, height, width) - 1


def to_mask(
    masks: Image.Image | np.ndarray | Sequence,
    height: int | None = None,
    width: int | None = None,
    box: Box | None = None,
) -> np.ndarray:
    """Masks as float32 [B, H, W, 1], 1 where they are at least half white and 0 elsewhere.

    Args:
      masks: one or several: Pillow's pictures, or arrays [H, W], [B, H, W] or [B, H, W, 1] of floats in [0, 1].
      height, width, box: as of `to_array`.

    Raises:
      ValueError: something that is not a mask.

    >>> to_mask(np.array([[0.2, 0.7]])).ravel()
    array([0., 1.], dtype=float32)
    """
    if isinstance(masks, Image.Image):
        masks = [masks]
    if isinstance(masks, Sequence) and masks and all(isinstance(m, Image.Image) for m in masks):
        size = (width or masks[0].width, height or masks[0].height)
        masks = np.stack([_pixels(mask, size, box, "L") for mask in masks])
    array = np.asarray(masks, np.float32)
    if array.ndim in (2, 3):
        array = array[None] if array.ndim == 2 or array.shape[-1] == 1 else array
        array = array if array.ndim == 4 else array[..., None]
    if array.ndim != 4 or array.shape[-1] != 1:
        raise ValueError(f"Expected masks [B, H, W, 1] or Pillow images, got an array of shape {np.shape(masks)}.")
    return np.float32(nearest(array, height, width) >= 0.5)


def _pixels(image: Image.Image, size: tuple[int, int], box: Box | None, mode: str = "RGB") -> np.ndarray:
    """A picture, or a part of it, at a size (width, height), as floats in [0, 1]."""
    image = image.resize(size, Image.Resampling.LANCZOS) if box is None else fitted(image.crop(box), *size)
    return np.asarray(image.convert(mode), np.float32) / 255


def unfolded(array: np.ndarray, side: int) -> np.ndarray:
    """Squares of pixels as channels, row by row: [B, H, W, C] -> [B, H / side, W / side, C side²].

    >>> unfolded(np.arange(4.0).reshape(1, 2, 2, 1), 2).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    b, h, w, c = array.shape
    array = array.reshape(b, h // side, side, w // side, side, c).transpose(0, 1, 3, 5, 2, 4)
    return array.reshape(b, h // side, w // side, -1)


def nearest(array: np.ndarray, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Pictures [B, H, W, C] at another size: the source of pixel i of n is ⌊i · (old / n)⌋ in float32, as in PyTorch.

    >>> nearest(np.arange(4.0).reshape(1, 2, 2, 1), 1, 1).item()
    0.0
    """
    source = lambda n, old: np.minimum(np.floor(np.arange(n, dtype=np.float32) * np.float32(old / n)), old - 1).astype(
        int
    )
    rows, columns = (source(n or old, old) for n, old in zip((height, width), array.shape[1:3]))
    return array[:, rows][:, :, columns]


def cubic(old: int, new: int, low_pass: bool = False) -> np.ndarray:
    """The matrix [new, old] that brings `old` samples to `new` by a cubic of the four about each.

    Pixels are areas. As in PyTorch's bicubic interpolation the cubic has a = -0.75, and edges are repeated; with a
    `low_pass`, as with its `antialias`, a = -0.5, fewer samples are means over more, and there is nothing beyond edges.

    >>> cubic(4, 2)[0]
    array([ 0.5  ,  0.59375, -0.09375,  0.     ])
    """
    a, center = -0.5 if low_pass else -0.75, (np.arange(new) + 0.5) * old / new - 0.5

    def weigh(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
        return np.where(x <= 1, inner, np.where(x < 2, outer, 0))

    if low_pass:
        matrix = weigh((np.arange(old) - center[:, None]) / max(old / new, 1))
        return matrix / matrix.sum(1, keepdims=True)
    first, matrix = np.floor(center).astype(int), np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        source = np.clip(first + offset, 0, old - 1)
        np.add.at(matrix, (np.arange(new), source), weigh(center - first - offset))
    return matrix


def bicubic(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pictures [B, H, W, C] at another size, see `cubic`.

    >>> bicubic(np.ones((1, 3, 3, 1)), 5, 4).shape
    (1, 5, 4, 1)
    """
    rows, columns = cubic(array.shape[1], height), cubic(array.shape[2], width)
    return np.einsum("ih,bhwc,jw->bijc", rows, array, columns)


def blur(mask: Image.Image, blur_factor: int = 4) -> Image.Image:
    """A mask with soft edges: a Gaussian of so many pixels.

    >>> blur(Image.new("L", (8, 8))).size
    (8, 8)
    """
    return mask.filter(ImageFilter.GaussianBlur(blur_factor))


def crop_region(mask: Image.Image, width: int, height: int, pad: int = 0) -> Box:
    """The smallest box around what a mask marks, padded, and then grown to the proportions of width to height.

    Args:
      mask: black where nothing is to change.
      width, height: of the picture that the part is to become.
      pad: in pixels, on each side.

    Raises:
      ValueError: the mask marks nothing.

    >>> mask = Image.new("L", (64, 64)); mask.paste(255, (20, 20, 28, 24))
    >>> crop_region(mask, 32, 32, pad=2)
    (18, 16, 30, 28)
    """
    inside = mask.convert("L").getbbox()
    if inside is None:
        raise ValueError("The mask is black all over, so there is no part to crop; paint what is to change white.")
    (left, top, right, bottom), (across, down) = inside, mask.size
    left, top, right, bottom = max(left - pad, 0), max(top - pad, 0), min(right + pad, across), min(bottom + pad, down)
    if (right - left) / (bottom - top) > width / height:
        top, bottom = _grown(top, bottom, int((right - left) / (width / height) - (bottom - top)), down)
    else:
        left, right = _grown(left, right, int((bottom - top) * (width / height) - (right - left)), across)
    return left, top, right, bottom


def _grown(start: int, stop: int, by: int, limit: int) -> tuple[int, int]:
    """An interval longer by so much, on both sides alike where there is room within [0, limit]."""
    start, stop = start - by // 2, stop + by - by // 2
    over = max(stop - limit, 0)
    start, stop = start - over, stop - over
    under = max(-start, 0)
    return start + under, min(stop + under, limit)


def fitted(image: Image.Image, width: int, height: int, crop: bool = False) -> Image.Image:
    """A picture at another size that keeps its proportions, in the middle.

    Args:
      width, height: in pixels.
      crop: cut off what is too much; else what is missing is filled with the picture's first and last row or column.

    >>> fitted(Image.new("RGB", (8, 4)), 16, 16).size
    (16, 16)
    """
    wider = width / height > image.width / image.height
    by_height = wider != crop and width / height != image.width / image.height
    across = image.width * height // image.height if by_height else width
    down = height if by_height else image.height * width // image.width
    resized = image.resize((across, down), Image.Resampling.LANCZOS)
    left, top = width // 2 - across // 2, height // 2 - down // 2
    sheet = Image.new("RGB", (width, height))
    sheet.paste(resized, (left, top))
    if not crop and by_height and left > 0:
        sheet.paste(resized.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        sheet.paste(resized.resize((left, height), box=(across, 0, across, height)), (left + across, 0))
    elif not crop and top > 0:
        sheet.paste(resized.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        sheet.paste(resized.resize((width, top), box=(0, down, width, down)), (0, top + down))
    return sheet


def apply_overlay(mask: Image.Image, original: Image.Image, image: Image.Image, box: Box | None = None) -> Image.Image:
    """A painted picture with the original over it where the mask is black; grey mixes them.

    Args:
      mask, original: of one size.
      image: what was painted: of that size, or of any size where it is to fill `box`.
      box: the part of the original that it replaces.

    >>> white, black = Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4))
    >>> apply_overlay(Image.new("L", (4, 4)), white, black).getpixel((0, 0))
    (255, 255, 255)
    """
    above = Image.new("RGBa", original.size)
    above.paste(original.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    if box is not None:
        sheet = Image.new("RGBA", original.size)
        sheet.paste(fitted(image, box[2] - box[0], box[3] - box[1], crop=True), box[:2])
        image = sheet.convert("RGB")
    image = image.convert("RGBA")
    image.alpha_composite(above.convert("RGBA"))
    return image.convert("RGB")


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _pillows(images: Image.Image | np.ndarray | Sequence) -> Sequence[Image.Image]:
    """One picture or several, as Pillow's."""
    if hasattr(images, "ndim"):
        images = to_pil(images if images.ndim == 4 else images[None])
    return [images] if isinstance(images, Image.Image) else images


def clip_pixels(images: Image.Image | np.ndarray | Sequence, size: int = 224) -> np.ndarray:
    """Pictures as CLIP's image encoders read them, float32 [B, S, S, 3].

    The shorter side is brought to `size`, the middle is cut out, and each channel normalised.

    Args:
      images: one picture or several: Pillow's, or arrays [H, W, 3] or [B, H, W, 3] of floats in [0, 1].
      size: side in pixels.

    >>> clip_pixels(Image.new("RGB", (400, 300), "white")).shape
    (1, 224, 224, 3)
    """
    cut = []
    for image in _pillows(images):
        scale = size / min(image.size)
        width, height = (max(int(side * scale), size) for side in image.size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        cut.append(np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / 255)
    return ((np.stack(cut) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).astype(np.float32)


def square_pixels(
    images: Image.Image | np.ndarray | Sequence,
    size: int = 384,
    mean: Sequence[float] = (0.5,) * 3,
    std: Sequence[float] = (0.5,) * 3,
) -> np.ndarray:
    """Pictures squeezed into a square, float32 [B, S, S, 3], each channel normalised.

    By default to [-1, 1], as depth models and SigLIP read them.

    Args:
      images: as of `clip_pixels`.
      size: side in pixels.
      mean, std: of each channel.

    >>> square_pixels(Image.new("RGB", (400, 300), "white"), 384).shape
    (1, 384, 384, 3)
    """
    squares = [image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for image in _pillows(images)]
    return (np.stack([np.asarray(image, np.float32) for image in squares]) / 255 - np.float32(mean)) / np.float32(std)


def inception_pixels(images: Image.Image | np.ndarray | Sequence) -> np.ndarray:
    """Pictures as the network of FID reads them, float32 [B, 299, 299, 3] in [-1, 1).

    Args:
      images: as of `clip_pixels`.

    Enlarged or reduced as its authors did: between the two nearest, with the corner of a pixel for its place.

    >>> inception_pixels(Image.new("RGB", (400, 300), "black"))[0, 0, 0]
    array([-1., -1., -1.], dtype=float32)
    """

    def linear(old: int, new: int) -> np.ndarray:
        at = np.arange(new, dtype=np.float32) * np.float32(old / new)
        first = np.minimum(at.astype(int), old - 1)
        share = (at - first)[:, None]
        return (1 - share) * np.eye(old)[first] + share * np.eye(old)[np.minimum(first + 1, old - 1)]

    side, read = 299, []
    for image in _pillows(images):
        array = np.asarray(image.convert("RGB"), np.float64)
        rows, columns = (linear(old, side) for old in array.shape[:2])
        read.append(np.einsum("ih,hwc,jw->ijc", rows, array, columns, optimize=True))
    return ((np.stack(read) - 128) / 128).astype(np.float32)


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


# --- diffusers' names -------------------------------------------------------------------------------------------------

numpy_to_pil = to_pil


class VaeImageProcessor:
    """Pictures as networks have them, and back.

    >>> pixels = VaeImageProcessor.preprocess(Image.new("RGB", (16, 8), "white"))
    >>> pixels.shape, VaeImageProcessor.postprocess(pixels)[0].getpixel((0, 0))
    ((1, 8, 16, 3), (255, 255, 255))
    """

    preprocess = staticmethod(to_array)
    numpy_to_pil = staticmethod(to_pil)
    blur, apply_overlay, get_crop_region = staticmethod(blur), staticmethod(apply_overlay), staticmethod(crop_region)

    @staticmethod
    def postprocess(image: np.ndarray, output_type: str = "pil") -> np.ndarray | list[Image.Image]:
        """Pictures [B, H, W, 3] in [-1, 1] as Pillow's, as "np" in [0, 1], or as they are ("latent").

        Raises:
          ValueError: another `output_type`.
        """
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type={output_type!r} is not known; use 'pil', 'np' or 'latent'.")
        if output_type == "latent":
            return image
        image = np.clip(np.asarray(image, np.float32) / 2 + 0.5, 0, 1)
        return image if output_type == "np" else to_pil(image)


class IPAdapterMaskProcessor:
    """Masks of where a picture counts."""

    @staticmethod
    def preprocess(mask: Image.Image | np.ndarray | Sequence, height: int, width: int) -> list[np.ndarray]:
        """Masks of a size, [H, W] of 0 and 1 each: one entry of `ip_adapter_masks`."""
        return [one[..., 0] for one in to_mask(mask, height, width)]
