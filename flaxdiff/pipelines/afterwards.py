"""What becomes of pictures once they are decoded: a checkpoint's checker looks at them, a watermark goes in.

Both happen on the host, in a call of a pipeline and not in `generate`, the pure function, whose pictures are as they
are decoded.
"""

import functools
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flaxdiff import core, parallel
from flaxdiff import images as pictures

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

CHECKER = "safety_checker"
BITS = [int(bit) for bit in f"{0xB3EC907BB19E:b}"]  # by which Stable Diffusion XL's pictures are known
SMALLEST = 256  # pixels across of a picture that has room for them

_flagged = jax.jit(core.apply, static_argnums=0)


def need_checker(pipe: "DiffusionPipeline", params: Mapping[str, core.Params]) -> None:
    """Raise ValueError where a checker has no parameters."""
    if CHECKER in dict(pipe.specs) and CHECKER not in params:
        raise ValueError(
            f"params lacks {CHECKER}, by which {type(pipe).__name__} checks its pictures; give its parameters, or do "
            f"without: {type(pipe).__name__}.from_pipe(pipe, {CHECKER}=None)."
        )


def checked(
    pipe: "DiffusionPipeline", params: Mapping[str, core.Params], images: np.ndarray
) -> tuple[np.ndarray, list[bool] | None]:
    """Pictures [B, H, W, C] in [0, 1], black where the pipeline's checker flags them, and which; None without one."""
    spec = dict(pipe.specs).get(CHECKER)
    if spec is None:
        return images, None
    pixels = pictures.clip_pixels(images[..., :3], spec.config.image_size)
    flags = np.asarray(parallel.collected(_flagged(spec, params[CHECKER], pixels)))
    if flags.any():
        warnings.warn(
            f"{flags.sum()} of {len(flags)} pictures were flagged by the safety checker and are black; try another "
            "prompt or key.",
            stacklevel=3,
        )
        images = np.where(flags[:, None, None, None], np.float32(0), images)
    return images, flags.tolist()


def invisible_watermark(images: np.ndarray) -> np.ndarray:
    """Stable Diffusion XL's watermark in pictures, for `pipe.replace(watermark=flaxdiff.invisible_watermark)`.

    Args:
      images: float32 [B, H, W, 3] in [0, 1]; those less than 256 pixels wide stay as they are.

    Raises:
      ImportError: the package invisible-watermark is not installed.

    >>> invisible_watermark(np.zeros((1, 64, 64, 3), np.float32)).shape
    (1, 64, 64, 3)
    """
    if images.shape[2] < SMALLEST:
        return images
    mark = lambda image: encoder().encode(255 * image[..., ::-1], "dwtDct")[..., ::-1]  # it reads blue first
    marked = np.stack([mark(image) for image in images])
    return np.clip(marked / 255, 0, 1).astype(np.float32)


@functools.cache
def encoder() -> Any:
    """The package's own, told the bits. Raises ImportError where it is not installed."""
    try:
        from imwatermark import WatermarkEncoder
    except ImportError as error:
        raise ImportError(
            "The watermark needs the package invisible-watermark: pip install invisible-watermark; or give watermark= "
            "a function of your own, or None."
        ) from error
    made = WatermarkEncoder()
    made.set_watermark("bits", BITS)
    return made
