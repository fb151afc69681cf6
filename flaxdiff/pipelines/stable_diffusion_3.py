"""Stable Diffusion 3 and 3.5: two encoders of CLIP and one of T5, a flow transformer, and latents of 16 channels.

The transformer reads CLIP's tokens, both encoders' side by side, and after them T5's; what CLIP makes of the whole text
it is told as it is told the time. T5, half of all weights, may be left out (`text_encoder_3=None`, `tokenizer_3=None`
when loading): zeros stand for its tokens.

Reference: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.adapters import ip_adapter
from flaxdiff.guidance import layer_skipping
from flaxdiff.pipelines import flow
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.guided import PAGMixin
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import native_image_to_image
from flaxdiff.pipelines.tasks.inpaint import inpaint, paste_back
from flaxdiff.pipelines.text import branches, check_prompts, check_together, texts

LONGEST = 512  # tokens of T5


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    prompt_2: str | Sequence[str] | None = None,
    prompt_3: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    negative_prompt_2: str | Sequence[str] | None = None,
    negative_prompt_3: str | Sequence[str] | None = None,
    prompt_embeds: jax.Array | None = None,
    negative_prompt_embeds: jax.Array | None = None,
    pooled_prompt_embeds: jax.Array | None = None,
    negative_pooled_prompt_embeds: jax.Array | None = None,
    clip_skip: int = 0,
    max_sequence_length: int = 256,
) -> dict[str, Any]:
    """The prompts as tokens of all encoders, or as embeddings.

    Args:
      prompt, negative_prompt: what to draw and what to avoid.
      prompt_2, prompt_3, …: the same for the second encoder of CLIP and for T5; by default what the first reads.
      prompt_embeds, pooled_prompt_embeds, …: in their place, [B, N, D] and [B, P].
      clip_skip: how many layers before the last but one to read CLIP at, for the prompt.
      max_sequence_length: of the text, in tokens of T5.

    Raises:
      ValueError: no prompt, embeddings of one kind only, or a text of more than 512 tokens.
    """
    check_prompts(pipe, prompt, prompt_embeds)
    if not 0 < max_sequence_length <= LONGEST:
        raise ValueError(f"max_sequence_length={max_sequence_length}: T5 reads between 1 and {LONGEST} tokens here.")
    arrays: dict[str, Any] = {"clip_skip": clip_skip}
    sources = {"": ((prompt, prompt_2, prompt_3), prompt_embeds, pooled_prompt_embeds)}
    if guided:
        words = negative_prompt, negative_prompt_2, negative_prompt_3
        sources["negative_"] = words, negative_prompt_embeds, negative_pooled_prompt_embeds
    for prefix, ((first, *others), embeds, pooled) in sources.items():
        check_together(**{f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled})
        if embeds is not None:
            arrays |= {f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled}
            continue
        second, third = (texts(other or first) for other in others)
        arrays[f"{prefix}prompt_ids"] = pipe.tokenizer(texts(first))
        arrays[f"{prefix}prompt_ids_2"] = pipe.tokenizer_2(second)
        nothing = np.zeros((1, max_sequence_length), np.int32)  # as long as what T5 would say
        there = "tokenizer_3" in dict(pipe.tokenizers)
        arrays[f"{prefix}prompt_ids_3"] = pipe.tokenizer_3(third, max_sequence_length) if there else nothing
    return arrays


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch: CLIP's tokens, filled up with zeros, and T5's; and CLIP's projections side by side."""
    cond = {}
    for branch, prefix in branches(inputs).items():
        if f"{prefix}prompt_embeds" in inputs:
            text, pooled = inputs[f"{prefix}prompt_embeds"], inputs[f"{prefix}pooled_prompt_embeds"]
        else:
            outputs = [networks(f"text_encoder{i}", inputs[f"{prefix}prompt_ids{i}"]) for i in ("", "_2")]
            skip = 0 if prefix else jnp.asarray(inputs["clip_skip"])
            clip = jnp.concatenate([o.hidden_states[len(o.hidden_states) - 2 - skip] for o in outputs], -1)
            text = _with_t5(networks, clip, jnp.asarray(inputs[f"{prefix}prompt_ids_3"]))
            pooled = jnp.concatenate([o.text_embeds for o in outputs], -1)
        cond[branch] = {"text": text, "pooled": pooled} | ip_adapter.seen(networks, inputs, branch)
    return cond


def _with_t5(networks: Networks, clip: jax.Array, ids: jax.Array) -> jax.Array:
    """CLIP's tokens [B, N, D], and behind them what T5 makes of ids [B, M], or zeros where there is none."""
    width = networks.config("transformer").joint_attention_dim
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[-1])))
    there = "text_encoder_3" in networks.specs
    t5 = networks("text_encoder_3", ids) if there else jnp.zeros((len(clip), ids.shape[1], width), clip.dtype)
    return jnp.concatenate([clip, t5.astype(clip.dtype)], 1)


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What times [N] and the pooled text say to the transformer's blocks, and to those who read pictures."""
    made = {"transformer": networks("transformer", timesteps[:, None], cond["pooled"], method="times")}
    names = ip_adapter.named(networks.specs, ip_adapter.KIND)
    return made | {name: networks(name, timesteps[:, None], method="times") for name in names if name in cond}


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond, added: jax.Array | None = None) -> jax.Array:
    """The velocity; `added`: what ControlNets add, as the transformer takes it."""
    names = ip_adapter.named(networks.specs, ip_adapter.KIND)
    pictures = tuple(networks(name, cond[name]["patches"], t[name], cond[name]["scale"]) for name in names if name in t)
    return networks("transformer", x, cond["text"], None, t["transformer"], added, cond.get("perturb"), pictures)


STABLE_DIFFUSION_3 = sd.STABLE_DIFFUSION._replace(
    prepare=prepare,
    encode=encode,
    predict=predict,
    times=times,
    distilled=None,
    loop="transformer|controlnet",
    schedule=flow.shifted,
)


class StableDiffusion3Pipeline(DiffusionPipeline):
    """Text to image with Stable Diffusion 3 or 3.5; `skip_guidance_layers=[7, 8, 9]` guides by those blocks as well.

    >>> import flaxdiff
    >>> stages = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    >>> vae = dict(stages, latent_channels=16, block_out_channels=[128, 256, 512, 512])
    >>> transformer = flaxdiff.SD3Transformer2DModel.from_config({})
    >>> specs = ("transformer", transformer), ("vae", flaxdiff.AutoencoderKL.from_config(vae))
    >>> pipe = StableDiffusion3Pipeline(specs, flaxdiff.FlowMatchEulerDiscreteScheduler(shift=3.0))
    >>> text = dict(prompt_embeds=np.zeros((1, 333, 4096)), pooled_prompt_embeds=np.zeros((1, 2048)), guidance_scale=1)
    >>> pipe.prepare_inputs(**text, num_inference_steps=3)["size"]
    Size(height=1024, width=1024)
    """

    family = STABLE_DIFFUSION_3
    guides = staticmethod(layer_skipping)
    defaults = {"num_inference_steps": 28, "guidance_scale": 7.0}


class StableDiffusion3Img2ImgPipeline(StableDiffusion3Pipeline):
    """Image to image with Stable Diffusion 3 or 3.5."""

    task = staticmethod(native_image_to_image)
    defaults = {"num_inference_steps": 50, "guidance_scale": 7.0, "strength": 0.6}


class StableDiffusion3InpaintPipeline(StableDiffusion3Pipeline):
    """Paint over a part of a picture with Stable Diffusion 3 or 3.5."""

    task, finish = staticmethod(inpaint), staticmethod(paste_back)
    defaults = StableDiffusion3Img2ImgPipeline.defaults


class StableDiffusion3PAGPipeline(PAGMixin, StableDiffusion3Pipeline):
    """Text to image with Stable Diffusion 3 or 3.5."""

    defaults = {**StableDiffusion3Pipeline.defaults, "pag_applied_layers": ("blocks.1",)}


class StableDiffusion3PAGImg2ImgPipeline(PAGMixin, StableDiffusion3Img2ImgPipeline):
    """Image to image with Stable Diffusion 3 or 3.5."""

    defaults = {**StableDiffusion3Img2ImgPipeline.defaults, "pag_applied_layers": ("blocks.1",)}
