"""Inpainting: paint over the white part of a mask, with a network made for it or with any other.

A network with nine input channels sees the mask and the latent of the masked picture beside the sample; Flux Fill that
latent and all pixels of the mask. One with four does not know; what the mask leaves alone is put back after each of its
steps (see `blend.py`). Some autoencoders (AsymmetricAutoencoderKL) see the picture and the mask as they decode.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from PIL import Image

from flaxdiff import images as pictures
from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.tasks import (
    Prepared,
    check_channels,
    check_size,
    is_latents,
    native_size,
    noise,
    room_beside,
    vae_factor,
)

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline


def inpaint(
    pipe: "DiffusionPipeline",
    image: Any = None,
    mask_image: Any = None,
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    denoising_start: float | None = None,
    padding_mask_crop: int | None = None,
    masked_image_latents: jax.Array | None = None,
    latents: jax.Array | None = None,
) -> Prepared:
    """Paint over a part of a picture.

    Args:
      image: Pillow pictures, arrays [B, H, W, 3] in [0, 1], or latents [B, h, w, Z].
      mask_image: Pillow pictures, or arrays [B, H, W, 1] in [0, 1]: what is at least half white is painted over.
      height, width: of the result in pixels, by default what the network was trained on; the picture is resized.
      strength: how much of the schedule to run: 1 starts from noise alone.
      denoising_start: begin where this share of the denoising is done, on latents that are as noisy as that.
      padding_mask_crop: work on the part around the mask alone, with so many pixels around it, at the full size. Pillow
        pictures get it pasted back; other types of output are the part itself.
      masked_image_latents: for networks with nine channels, in place of the latent of the masked picture.
      latents: the noise to use, of unit variance, in place of what the key gives.

    Raises:
      ValueError: no picture or no mask, sizes that do not fit, a network with other channels.
    """
    name, native = type(pipe).__name__, native_size(pipe)
    need_both(pipe, image, mask_image)
    size = Size(height or native.height, width or native.width)
    if is_latents(pipe, image):
        size = Size(*(side * vae_factor(pipe) for side in image.shape[1:3]))
    check_size(pipe, size)
    box = region(image, mask_image, size, padding_mask_crop)
    mask = pictures.to_mask(mask_image, size.height, size.width, box)
    if is_latents(pipe, image):
        start = {"image_latents" if denoising_start is None else "noisy_latents": image}
    else:
        start = {"image": pictures.to_array(image, size.height, size.width, box)}
    small = pictures.nearest(mask, *(side // vae_factor(pipe) for side in (size.height, size.width)))

    if "image" in start and "mask" in inspect.signature(pipe.vae.module.decode).parameters:
        start |= {"decoder_image": start["image"], "decoder_mask": np.float32(mask)}

    match room_beside(pipe):
        case 0:
            start["mask"] = small
        case channels if channels == 1 + pipe.vae.config.latent_channels:
            start |= _beside(small, mask, start.get("image"), masked_image_latents)
        case channels if channels == vae_factor(pipe) ** 2 + pipe.vae.config.latent_channels and "image" in start:
            if masked_image_latents is not None:
                raise ValueError(f"{name} encodes the masked picture itself; leave masked_image_latents out.")
            start |= _beside(small, mask, start["image"], None)
            start["behind"] = pictures.unfolded(np.float32(mask), vae_factor(pipe))
            del start["beside"]
        case _:
            raise ValueError(
                f"{name}: a network with {pipe.denoiser.config.in_channels} input channels is not made for this; it "
                "needs those of the latents, or twice as many and one for the mask."
            )
    if denoising_start is not None:
        return size, start | noise(pipe, size, latents), {"denoising_start": denoising_start}
    strength = pipe.defaults["strength"] if strength is None else strength
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must lie in (0, 1].")
    start["from_noise"] = np.bool_(strength == 1)
    return size, start | noise(pipe, size, latents), {"strength": strength}


def by_example(
    pipe: "DiffusionPipeline", image: Any = None, mask_image: Any = None, latents: jax.Array | None = None
) -> Prepared:
    """Paint over a part of a picture, with a network that sees what is known and then where it is known.

    Args:
      image: Pillow pictures, or arrays [B, H, W, 3] in [0, 1], of the size that the result is to have.
      mask_image: Pillow pictures, or arrays [B, H, W, 1] in [0, 1]: what is at least half white is painted over.
      latents: the noise to use, of unit variance, in place of what the key gives.

    Raises:
      ValueError: no picture or no mask, a size that the networks do not divide, a network with other channels.
    """
    need_both(pipe, image, mask_image)
    check_channels(pipe, 1 + pipe.vae.config.latent_channels)
    picture = pictures.to_array(image)
    size = Size(*picture.shape[1:3])
    check_size(pipe, size)
    mask = pictures.to_mask(mask_image, size.height, size.width)
    small = pictures.nearest(mask, *(side // vae_factor(pipe) for side in (size.height, size.width)))
    start = _beside(small, mask, picture, None)
    start["behind"] = 1 - start.pop("beside")
    return size, start | noise(pipe, size, latents), {}


def need_both(pipe: "DiffusionPipeline", image: Any, mask_image: Any) -> None:
    """Raise ValueError where there is no picture or no mask."""
    if image is None or mask_image is None:
        absent = "image" if image is None else "mask_image"
        raise ValueError(
            f"{type(pipe).__name__} paints over a part of a picture; give both image= and mask_image= "
            f"({absent} is missing)."
        )


def _beside(small: np.ndarray, mask: np.ndarray, image: Any, masked_image_latents: Any) -> dict[str, Any]:
    """The channels that a network made for inpainting sees: the mask, and the latent of what it leaves alone."""
    if masked_image_latents is not None:
        masked = np.asarray(masked_image_latents, np.float32)
        if masked.shape[1:3] != small.shape[1:3]:
            raise ValueError(
                f"masked_image_latents have shape {masked.shape}, and the mask of the latents {small.shape}."
            )
        batch = max(len(masked), len(small))
        joined = [np.broadcast_to(a, (batch, *a.shape[1:])) for a in (small, masked)]
        return {"beside": np.concatenate(joined, -1)}
    if image is None:
        raise ValueError("Latents cannot be masked as a picture can; give masked_image_latents= beside them.")
    return {
        "beside": small,
        "beside_image": image * (mask < 0.5),
        "beside_gain": np.float32(1),
        "beside_spread": np.float32(1),
    }


def region(image: Any, mask_image: Any, size: Size, padding_mask_crop: int | None) -> pictures.Box | None:
    """The part of the picture to work on; None for all of it. Raises ValueError where it cannot be cut out."""
    if padding_mask_crop is None:
        return None
    if not isinstance(image, Image.Image) or not isinstance(mask_image, Image.Image):
        raise ValueError("padding_mask_crop cuts a part out of one Pillow picture; give image and mask_image as such.")
    if image.size != mask_image.size:
        raise ValueError(f"padding_mask_crop needs a mask of the picture's size {image.size}, not {mask_image.size}.")
    return pictures.crop_region(mask_image, size.width, size.height, padding_mask_crop)


def paste_back(images: list[Image.Image], options: Mapping[str, Any]) -> list[Image.Image]:
    """What was painted for a part of a picture, within the picture."""
    pad = options.get("padding_mask_crop")
    if pad is None:
        return images
    image, mask = options["image"], options["mask_image"]
    box = region(image, mask, Size(images[0].height, images[0].width), pad)
    return [pictures.apply_overlay(mask, image, painted, box) for painted in images]
