"""Pictures of any size from networks that were trained on a few: made at the one whose aspect is nearest, then resized.

Reference: Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, 2023.
"""

from typing import TYPE_CHECKING

import jax

from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.tasks import Prepared, native_size, text_to_image

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

# heights and widths that the networks were trained on, in 32nds of the native side, and those of the largest as well
TRAINED = """
16x64 16x58 18x56 18x54 18x52 20x50 20x48 22x46 22x44 22x42 24x42 24x40 26x38 26x36 28x36 28x34 30x34 30x32 32x32
32x30 34x30 34x28 36x28 36x26 38x26 40x24 42x24 44x22 46x22 48x20 50x20 54x18 64x16
"""
LARGEST = "16x62 16x60 52x18 56x18 58x16 60x16 62x16"


def nearest(pipe: "DiffusionPipeline", size: Size) -> Size:
    """The size that the network was trained on whose aspect is nearest.

    Raises:
      ValueError: the network was trained on sizes that are not known.
    """
    side = pipe.denoiser.config.sample_size
    if side not in (32, 64, 128, 256):
        raise ValueError(
            f"{type(pipe).__name__}: what sizes a network with sample_size={side} was trained on is not known; give "
            "use_resolution_binning=False to make the picture at the size itself."
        )
    trained = [tuple(map(int, pair.split("x"))) for pair in (TRAINED + LARGEST * (side == 256)).split()]
    trained.sort(key=lambda pair: pair[0] / pair[1])
    aspect = size.height / size.width
    height, width = min(trained, key=lambda pair: abs(round(pair[0] / pair[1], 2) - aspect))
    unit = native_size(pipe).height // 32
    return Size(unit * height, unit * width)


def text_to_image_of_any_size(
    pipe: "DiffusionPipeline",
    height: int | None = None,
    width: int | None = None,
    use_resolution_binning: bool = True,
    latents: jax.Array | None = None,
) -> Prepared:
    """Start from noise, at a size that the network was trained on.

    Args:
      height, width, latents: as of `text_to_image`; the noise is of the size that is worked at.
      use_resolution_binning: work at the trained size of the nearest aspect, and resize and crop what is decoded.

    Raises:
      ValueError: as `nearest`, and where there is no binning as `text_to_image`.
    """
    if not use_resolution_binning:
        return text_to_image(pipe, height, width, latents)
    native = native_size(pipe)
    asked = Size(height or native.height, width or native.width)
    worked = nearest(pipe, asked)
    size, arrays, window = text_to_image(pipe, worked.height, worked.width, latents)
    return size, arrays if asked == size else arrays | {"decoder_size": asked}, window


def filling(images: jax.Array, size: Size) -> jax.Array:
    """Pictures [B, H, W, C] resized until they fill a size, of which what sticks out on two sides is cut off."""
    b, h, w, c = images.shape
    ratio = max(size.height / h, size.width / w)
    h, w = max(int(h * ratio), size.height), max(int(w * ratio), size.width)  # what is cut off may be a hair less
    images = jax.image.resize(images, (b, h, w, c), "linear", antialias=False)
    top, left = (h - size.height) // 2, (w - size.width) // 2
    return images[:, top : top + size.height, left : left + size.width]
