"""aMUSEd: a picture as a grid of codes, all of them masked at first, the surest of which are told in each step.

The scheduler draws codes and not noise, so a run moves whole numbers [B, h, w]; the loop is that of all others. Of a
picture to start from some codes are masked, by chance or because a mask lies over them.

Reference: Patil et al., aMUSEd: An Open MUSE Reproduction, 2024; Chang et al., Muse, 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import core
from flaxdiff import images as pictures
from flaxdiff.pipelines.generate import Cond, Family, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import Prepared, check_size, need, vae_factor
from flaxdiff.pipelines.text import branches, check_prompts, texts


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    prompt_embeds: jax.Array | None = None,
    encoder_hidden_states: jax.Array | None = None,
    negative_prompt_embeds: jax.Array | None = None,
    negative_encoder_hidden_states: jax.Array | None = None,
    micro_conditioning_aesthetic_score: float = 6,
    micro_conditioning_crop_coord: tuple[float, float] = (0, 0),
) -> dict[str, Any]:
    """The prompts as tokens, or as embeddings where those are given, and the numbers that the network is told.

    Args:
      prompt, negative_prompt: what to draw and what to avoid; one text or several.
      prompt_embeds, encoder_hidden_states: in place of the prompt, its projected state [B, P] and those of its tokens
        [B, N, D]; likewise for the negative one.
      micro_conditioning_aesthetic_score: how good it is to look.
      micro_conditioning_crop_coord: where a picture like this would have been cut out of a larger one.

    Raises:
      ValueError: no prompt, or one of the two kinds of embeddings without the other.
    """
    prompts = check_prompts(pipe, prompt, prompt_embeds)
    told = [size.width, size.height, *micro_conditioning_crop_coord, micro_conditioning_aesthetic_score]
    arrays: dict[str, Any] = {"micro_conds": np.float32([told])}
    sources = {"": (prompts, prompt_embeds, encoder_hidden_states)}
    if guided:
        sources["negative_"] = negative_prompt, negative_prompt_embeds, negative_encoder_hidden_states
    for prefix, (text, pooled, states) in sources.items():
        if (pooled is None) != (states is None):
            raise ValueError(f"{prefix}prompt_embeds and {prefix}encoder_hidden_states go together; give both.")
        if pooled is None:
            arrays[f"{prefix}prompt_ids"] = pipe.tokenizer(texts(text))
        else:
            arrays |= {f"{prefix}prompt_embeds": pooled, f"{prefix}encoder_hidden_states": states}
    return arrays


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch, its projected state, and the numbers."""
    cond = {}
    for branch, prefix in branches(inputs).items():
        if f"{prefix}prompt_embeds" in inputs:
            text, pooled = inputs[f"{prefix}encoder_hidden_states"], inputs[f"{prefix}prompt_embeds"]
        else:
            out = networks("text_encoder", inputs[f"{prefix}prompt_ids"])
            text, pooled = out.hidden_states[-2], out.text_embeds
        cond[branch] = {"text": text, "pooled": pooled, "micro_conds": jnp.asarray(inputs["micro_conds"])}
    return cond


def predict(networks: Networks, codes: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
    """The logits of every position; the network can see how much is masked, and is told no time."""
    return networks("transformer", codes, cond["text"], cond["pooled"], cond["micro_conds"])


def latent_shape(specs: Mapping[str, core.Spec], size: Size) -> tuple[int, int]:
    """(h, w): a code at each position."""
    factor = specs["vqvae"].config.factor
    return size.height // factor, size.width // factor


def decode(networks: Networks, codes: jax.Array) -> jax.Array:
    """Codes -> images in [-1, 1]; the autoencoder has them in [0, 1]."""
    return 2 * networks("vqvae", codes, method="decode") - 1


def start(networks: Networks, keys: jax.Array, inputs: Inputs) -> tuple[jax.Array, None]:
    """The codes to start from: all masked, or those of a picture of which the mask's, or some by chance, are masked."""
    plan = inputs["plan"]
    if "latents" in inputs:
        return jnp.asarray(inputs["latents"], jnp.int32), None
    if "image" not in inputs:
        return jnp.full((len(keys), *latent_shape(networks.specs, inputs["size"])), plan.mask_token_id), None
    codes = networks("vqvae", inputs["image"] / 2 + 0.5, method="codes")
    if "mask" in inputs:
        return jnp.where(inputs["mask"][..., 0] > 0, plan.mask_token_id, codes), None
    return plan.mask(codes, keys), None


AMUSED = Family(prepare, encode, predict, latent_shape, decode, loop="transformer", start=start)


def image_to_image(pipe: DiffusionPipeline, image: Any = None, strength: float | None = None) -> Prepared:
    """Start from the codes of a picture, some of them masked by chance.

    Args:
      image: Pillow pictures, or arrays [B, H, W, 3] in [0, 1].
      strength: how much of the schedule to run: near 0 keeps the picture, 1 forgets it.

    Raises:
      ValueError: no picture, or a size that the networks do not divide.
    """
    need(pipe, image)
    pixels = pictures.to_array(image)
    size = Size(*pixels.shape[1:3])
    check_size(pipe, size)
    return size, {"image": pixels}, {"strength": pipe.defaults["strength"] if strength is None else strength}


def inpaint(
    pipe: DiffusionPipeline, image: Any = None, mask_image: Any = None, strength: float | None = None
) -> Prepared:
    """Start from the codes of a picture, those under the white part of a mask being masked.

    Args:
      image, strength: as of `image_to_image`.
      mask_image: Pillow pictures, or arrays [B, H, W, 1] in [0, 1]: what is at least half white is painted over.

    Raises:
      ValueError: as `image_to_image`, and no mask.
    """
    size, arrays, window = image_to_image(pipe, image, strength)
    if mask_image is None:
        raise ValueError(f"{type(pipe).__name__} paints over a part of a picture; give mask_image=.")
    mask = pictures.to_mask(mask_image, *(side // vae_factor(pipe) for side in (size.height, size.width)))
    return size, arrays | {"mask": mask}, window | {"starting_mask_ratio": float(mask.mean())}


class AmusedPipeline(DiffusionPipeline):
    """Text to image by masked codes.

    >>> import flaxdiff
    >>> text = flaxdiff.CLIPTextModelWithProjection.from_config({"hidden_size": 768, "projection_dim": 768})
    >>> specs = ("text_encoder", text), ("transformer", flaxdiff.UVit2DModel.from_config({"sample_size": 16}))
    >>> vqvae = flaxdiff.VQModel.from_config({
    ...     "block_out_channels": [128] * 5,
    ...     "down_block_types": ["DownEncoderBlock2D"] * 5,
    ...     "up_block_types": ["UpDecoderBlock2D"] * 5})
    >>> scheduler, zeros = flaxdiff.AmusedScheduler(mask_token_id=8255), np.zeros
    >>> pipe = AmusedPipeline((*specs, ("vqvae", vqvae)), scheduler)
    >>> told = dict(prompt_embeds=zeros((1, 768)), encoder_hidden_states=zeros((1, 77, 768)), guidance_scale=1.0)
    >>> pipe.prepare_inputs(**told)["micro_conds"]
    array([[256., 256.,   0.,   0.,   6.]], dtype=float32)
    """

    family = AMUSED
    defaults = {"num_inference_steps": 12, "guidance_scale": 10.0}


class AmusedImg2ImgPipeline(DiffusionPipeline):
    """Image to image by masked codes."""

    family = AMUSED
    task = staticmethod(image_to_image)
    defaults = {**AmusedPipeline.defaults, "strength": 0.5}


class AmusedInpaintPipeline(DiffusionPipeline):
    """Paint over a part of a picture by masked codes."""

    family = AMUSED
    task = staticmethod(inpaint)
    defaults = {**AmusedPipeline.defaults, "strength": 1.0}
