"""Flux: a flow transformer that reads CLIP's pooled text as it reads the time, and T5's tokens beside the picture's.

The picture is a latent of 16 channels, of which 2 x 2 make a token. What is called guidance_scale is a number that the
distilled network is told; a negative prompt counts where `true_cfg_scale` is more than 1.

Reference: Black Forest Labs, FLUX.1, 2024.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flaxdiff.guidance import true_cfg
from flaxdiff.pipelines import flow
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import native_image_to_image
from flaxdiff.pipelines.tasks.inpaint import inpaint, paste_back
from flaxdiff.pipelines.text import branches, check_prompts, texts

PACK = 2  # latents along each side of a token
LONGEST = 512  # tokens of a text


def pack(x: jax.Array) -> jax.Array:
    """Latents [B, H, W, C] -> tokens [B, H/2 · W/2, 4 C], row by row.

    >>> pack(jnp.zeros((1, 4, 6, 16))).shape
    (1, 6, 64)
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // PACK, PACK, w // PACK, PACK, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h * w // PACK**2, c * PACK**2)


def unpack(x: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """Tokens [B, N, 4 C] -> latents [B, H, W, C] of these sides.

    >>> x = jnp.arange(64.0).reshape(1, 4, 8, 2)
    >>> bool((unpack(pack(x), (4, 8)) == x).all())
    True
    """
    h, w = (side // PACK for side in sides)
    x = x.reshape(len(x), h, w, -1, PACK, PACK).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(len(x), *sides, -1)


def places(sides: tuple[int, int], picture: int = 0) -> np.ndarray:
    """Which picture, row and column the tokens of a latent of these sides are at: [N, 3]."""
    grid = np.indices([side // PACK for side in sides], np.float32).reshape(2, -1).T
    return np.concatenate([np.full((len(grid), 1), picture, np.float32), grid], -1)


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    prompt_2: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    negative_prompt_2: str | Sequence[str] | None = None,
    prompt_embeds: jax.Array | None = None,
    negative_prompt_embeds: jax.Array | None = None,
    pooled_prompt_embeds: jax.Array | None = None,
    negative_pooled_prompt_embeds: jax.Array | None = None,
    guidance_scale: Any = None,
    max_sequence_length: int = LONGEST,
) -> dict[str, Any]:
    """The prompts as tokens of both encoders, or as embeddings, and the strength that the network is told.

    Args:
      prompt, negative_prompt: what to draw and what to avoid; the latter counts where `true_cfg_scale` is more than 1.
      prompt_2, negative_prompt_2: the same for T5; by default what CLIP reads.
      prompt_embeds, pooled_prompt_embeds, …: in their place, [B, N, D] and [B, P].
      guidance_scale: for networks that were distilled with it, one number, or one for each image.
      max_sequence_length: of the text, in tokens of T5.

    Raises:
      ValueError: no prompt, embeddings of one encoder only, or a text of more than 512 tokens.
    """
    check_prompts(pipe, prompt, prompt_embeds)
    if not 0 < max_sequence_length <= LONGEST:
        raise ValueError(f"max_sequence_length={max_sequence_length}: Flux reads between 1 and {LONGEST} tokens.")
    arrays: dict[str, Any] = {}
    if pipe.denoiser.config.guidance_embeds:
        arrays["timestep_cond"] = np.atleast_1d(np.asarray(guidance_scale, np.float32))
    sources = {"": (prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)}
    if guided and not (negative_prompt is None and negative_prompt_embeds is None):
        negatives = negative_prompt_embeds, negative_pooled_prompt_embeds
        sources["negative_"] = negative_prompt, negative_prompt_2, *negatives
    for prefix, (text, text_2, embeds, pooled) in sources.items():
        if (embeds is None) != (pooled is None):
            raise ValueError(f"{prefix}prompt_embeds and {prefix}pooled_prompt_embeds go together; give both.")
        if embeds is None:
            arrays[f"{prefix}prompt_ids"] = pipe.tokenizer(texts(text))
            arrays[f"{prefix}prompt_ids_2"] = pipe.tokenizer_2(
                texts(text if text_2 is None else text_2), max_sequence_length
            )
        else:
            arrays |= {f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled}
    return arrays


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch: T5's tokens, and CLIP's pooled state."""
    cond = {}
    for branch, prefix in branches(inputs).items():
        if f"{prefix}prompt_embeds" in inputs:
            text, pooled = inputs[f"{prefix}prompt_embeds"], inputs[f"{prefix}pooled_prompt_embeds"]
        else:
            text = networks("text_encoder_2", inputs[f"{prefix}prompt_ids_2"])
            pooled = networks("text_encoder", inputs[f"{prefix}prompt_ids"]).pooler_output
        cond[branch] = {"text": text, "pooled": pooled}
    return cond


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What times [N], the pooled text and the guidance say to the transformer's blocks."""
    told = timesteps[:, None] / 1000, cond["pooled"], cond.get("timestep_cond")
    return networks("transformer", *told, method="times")


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The velocity of latents [B, H, W, C]."""
    sides = x.shape[1:3]
    return unpack(networks("transformer", pack(x), cond["text"], None, t, places(sides)), sides)


FLUX = sd.STABLE_DIFFUSION._replace(
    prepare=prepare,
    encode=encode,
    predict=predict,
    times=times,
    distilled=None,
    loop="transformer|controlnet",
    schedule=flow.even,
    pack=PACK,
)


class FluxPipeline(DiffusionPipeline):
    """Text to image with Flux.

    >>> import flaxdiff
    >>> stages = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    >>> vae = dict(stages, latent_channels=16, block_out_channels=[128, 256, 512, 512])
    >>> transformer = flaxdiff.FluxTransformer2DModel.from_config({"guidance_embeds": True})
    >>> specs = ("transformer", transformer), ("vae", flaxdiff.AutoencoderKL.from_config(vae))
    >>> pipe = FluxPipeline(specs, flaxdiff.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    >>> text = dict(prompt_embeds=np.zeros((1, 512, 4096)), pooled_prompt_embeds=np.zeros((1, 768)))
    >>> inputs = pipe.prepare_inputs(**text, num_inference_steps=4)
    >>> inputs["size"], inputs["plan"].timesteps[:4].astype(int), inputs["timestep_cond"]
    (Size(height=1024, width=1024), array([1000,  904,  759,  512]), array([3.5], dtype=float32))
    """

    family = FLUX
    guides, asks = staticmethod(true_cfg), "true_cfg_scale"
    defaults = {"num_inference_steps": 28, "guidance_scale": 3.5, "true_cfg_scale": 1.0}


class FluxImg2ImgPipeline(FluxPipeline):
    """Image to image with Flux."""

    task = staticmethod(native_image_to_image)
    defaults = {**FluxPipeline.defaults, "guidance_scale": 7.0, "strength": 0.6}


class FluxInpaintPipeline(FluxPipeline):
    """Paint over a part of a picture with Flux, which is put back around it after each step."""

    task, finish = staticmethod(inpaint), staticmethod(paste_back)
    defaults = {**FluxPipeline.defaults, "guidance_scale": 7.0, "strength": 0.6}
