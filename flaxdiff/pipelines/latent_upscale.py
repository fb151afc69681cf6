"""A picture twice as high and wide, in latents: the upscaler of Katherine Crowson.

Its U-Net is told the noise level σ itself and predicts the picture through the preconditioning of Karras et al.,
Elucidating the Design Space of Diffusion-Based Generative Models, 2022. The text's pooled state enters with the time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks.upscale import latent_upscale
from flaxdiff.pipelines.text import texts


def pooled(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    guidance_scale: Any = None,
    prompt_embeds: jax.Array | None = None,
    pooled_prompt_embeds: jax.Array | None = None,
    negative_prompt_embeds: jax.Array | None = None,
    negative_pooled_prompt_embeds: jax.Array | None = None,
) -> dict[str, Any]:
    """What the text encoder pools, where embeddings are given; and with `guidance_scale=0` the empty prompt.

    Args:
      pooled_prompt_embeds, negative_pooled_prompt_embeds: [B, D], beside the embeddings themselves.
    """
    arrays: dict[str, Any] = {}
    if prompt is not None and np.all(np.asarray(guidance_scale) == 0):
        arrays["prompt_ids"] = pipe.tokenizer([""] * len(texts(prompt)))
    given = {"": (prompt_embeds, pooled_prompt_embeds)}
    given |= {"negative_": (negative_prompt_embeds, negative_pooled_prompt_embeds)} if guided else {}
    for prefix, (embeds, of_all) in given.items():
        if (embeds is None) != (of_all is None):
            raise ValueError(f"{prefix}prompt_embeds and {prefix}pooled_prompt_embeds go together; give both.")
        arrays |= {} if of_all is None else {f"{prefix}pooled_prompt_embeds": of_all}
    return arrays


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch, not normalised, its pooled state, and the noise level at each row [B, N]."""
    plan, cond = inputs["plan"], {}
    sigma = jnp.asarray(plan.sigma) / jnp.asarray(plan.alpha)
    for branch, prefix in (("positive", ""), ("negative", "negative_")):
        if f"{prefix}prompt_embeds" in inputs:
            text, pooled = inputs[f"{prefix}prompt_embeds"], inputs[f"{prefix}pooled_prompt_embeds"]
        elif f"{prefix}prompt_ids" in inputs:
            out = networks("text_encoder", inputs[f"{prefix}prompt_ids"])
            text, pooled = out.hidden_states[-1], out.pooler_output
        else:
            continue
        # in the place of an embedding of the noise in the picture, of which there is none
        half = (networks.config("unet").time_cond_proj_dim - pooled.shape[-1]) // 2
        clean = jnp.broadcast_to(jnp.repeat(jnp.array([1, 0], pooled.dtype), half), (len(pooled), 2 * half))
        cond[branch] = {
            "text": networks("unet", text, method="keys_values"),
            "timestep_cond": jnp.concatenate([clean, pooled], -1),
            "sigma": jnp.broadcast_to(sigma, (len(pooled), len(sigma))),
        }
    return cond


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What the U-Net makes of the noise levels, and those."""
    sigma = jnp.swapaxes(cond["sigma"], 0, 1)[: len(timesteps)]
    c_noise = jnp.log(jnp.maximum(sigma, 1e-6)) / 4  # beyond the plan's rows there is none
    return {"unet": networks("unet", c_noise, method="times", **sd.told(cond)), "sigma": sigma}


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The picture: (x / √(σ²+1) + σ F) / √(σ²+1), where the U-Net's last channel, a variance, is left out."""
    sigma = t["sigma"][:, None, None, None]
    output = networks("unet", x, t["unet"], cond["text"], **sd.weighed(cond))[..., :-1].astype(jnp.float32)
    return (x[..., : output.shape[-1]] + sigma * output) * jax.lax.rsqrt(sigma**2 + 1)


class StableDiffusionLatentUpscalePipeline(DiffusionPipeline):
    """A picture, or the latents of one, twice as high and wide."""

    family = sd.STABLE_DIFFUSION._replace(encode=encode, predict=predict, times=times, distilled=None)
    extras = (pooled,)
    task = staticmethod(latent_upscale)
    defaults = {"num_inference_steps": 75, "guidance_scale": 9.0}
