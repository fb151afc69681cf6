"""LDM3D: pictures with their depth, which the autoencoder decodes side by side.

Depth is a fourth channel; or, in the first checkpoints, three channels that are a picture of it, of which the second
and third are the high and the low byte of 16 bits.

Reference: Stan et al., LDM3D: Latent Diffusion Model for 3D, 2023.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flaxdiff import images as pictures
from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.stable_diffusion import STABLE_DIFFUSION

DEEPEST = 2**16 - 1


class LDM3DPipelineOutput(NamedTuple):
    """What a call returns: pictures, as Pillow's or an array, their depth, and which of them a checker flagged."""

    rgb: Any  # Pillow's, or float32 [B, H, W, 3] in [0, 1]
    depth: Any  # Pillow's with 16 bits, or float32 [B, H, W, 1] in [0, 1]
    nsfw_content_detected: list[bool] | None = None


def sixteen_bits(images: np.ndarray) -> np.ndarray:
    """The depth, uint16 [B, H, W, 1], of what was decoded [B, H, W, 4 or 6] in [0, 1].

    >>> sixteen_bits(np.float32([0, 0, 0, 0, 1, 0]).reshape(1, 1, 1, 6)).item()
    65280
    """
    if images.shape[-1] == 4:
        return (DEEPEST * images[..., 3:]).astype(np.uint16)
    high, low = (np.round(255 * images[..., i : i + 1]).astype(np.uint16) for i in (4, 5))
    return 256 * high + low


def presented(
    pipe: DiffusionPipeline, images: np.ndarray, flags: list[bool] | None, output_type: str, options: Mapping[str, Any]
) -> LDM3DPipelineOutput:
    """What was decoded [B, H, W, 4 or 6], as pictures and their depth."""
    rgb, depth = images[..., :3], sixteen_bits(images)
    if output_type == "pil":
        return LDM3DPipelineOutput(pictures.to_pil(rgb), [Image.fromarray(one[..., 0]) for one in depth], flags)
    return LDM3DPipelineOutput(rgb, images[..., 3:] if images.shape[-1] == 4 else np.float32(depth) / DEEPEST, flags)


def check(pipe: DiffusionPipeline, size: Size, guided: bool) -> dict[str, Any]:
    """Nothing. Raises ValueError where the autoencoder decodes no depth."""
    if (channels := pipe.vae.config.out_channels) not in (4, 6):
        raise ValueError(
            f"{type(pipe).__name__}: this autoencoder decodes {channels} channels; a picture with its depth has 4 or "
            "6. Use a checkpoint of LDM3D."
        )
    return {}


class StableDiffusionLDM3DPipeline(DiffusionPipeline):
    """Pictures, `.rgb`, with their depth, `.depth`, from a prompt."""

    family = STABLE_DIFFUSION
    extras = (check,)
    present = presented
    defaults = {"num_inference_steps": 49, "guidance_scale": 5.0}
