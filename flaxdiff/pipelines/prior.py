"""Priors: a loop over embeddings, from what CLIP says of a text to what it would say of a picture of it.

It is run before the loop over pictures, which finds the embedding among its inputs; see `pipeline.Before`.

Reference: Ramesh et al., Hierarchical Text-Conditional Image Generation with CLIP Latents, 2022.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import core
from flaxdiff.models.clip import end_of_text
from flaxdiff.pipelines.generate import Cond, Family, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import Prepared, noise
from flaxdiff.pipelines.text import branches, check_prompts, texts

POINT = Size(1, 1)  # an embedding has no sides


def embedding(pipe: DiffusionPipeline, latents: jax.Array | None = None) -> Prepared:
    """Start from noise.

    Args:
      latents: the noise to start from [B, D], of unit variance, in place of what the key gives.
    """
    return POINT, noise(pipe, POINT, latents), {}


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    text_model_output: tuple[jax.Array, jax.Array] | None = None,
    text_attention_mask: jax.Array | None = None,
) -> dict[str, Any]:
    """The prompts as tokens, or what the text encoder made of them; the opposite is an empty one.

    Args:
      prompt: what to draw; one text or several; or
      text_model_output, text_attention_mask: its projection [B, D] and last states [B, N, D], and which tokens to see.

    Raises:
      ValueError: neither or both of these, or states without a mask.
    """
    prompts = check_prompts(pipe, prompt, text_model_output, "text_model_output")
    negative = {"negative_prompt_ids": pipe.tokenizer([""])} if guided else {}
    if prompts is not None:
        return {"prompt_ids": pipe.tokenizer(texts(prompts))} | negative
    if text_attention_mask is None:
        raise ValueError(f"{type(pipe).__name__}: text_model_output needs text_attention_mask beside it; give both.")
    pooled, states = text_model_output[:2]
    mask = np.asarray(text_attention_mask, bool)
    return {"prompt_embeds": pooled, "prompt_states": states, "prompt_mask": mask} | negative


def described(networks: Networks, inputs: Inputs) -> Iterator[tuple[str, jax.Array, jax.Array, jax.Array]]:
    """Each branch with its text: the projection [B, D], the states [B, N, D], which tokens are to be seen [B, N]."""
    for branch, prefix in branches(inputs).items():
        if f"{prefix}prompt_embeds" in inputs:
            yield branch, *(jnp.asarray(inputs[f"{prefix}prompt_{part}"]) for part in ("embeds", "states", "mask"))
            continue
        ids = jnp.asarray(inputs[f"{prefix}prompt_ids"])
        out = networks("text_encoder", ids)
        end = end_of_text(ids, networks.config("text_encoder").eos_token_id)
        yield branch, out.text_embeds, out.last_hidden_state, jnp.arange(ids.shape[1]) <= end[:, None]


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch, as the prior reads it."""
    names = "proj_embedding", "encoder_hidden_states", "attention_mask"
    return {branch: dict(zip(names, text, strict=True)) for branch, *text in described(networks, inputs)}


def predict(networks: Networks, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
    """The embedding."""
    return networks("prior", x, t, **cond)


def latent_shape(specs: Mapping[str, core.Spec], size: Size) -> tuple[int]:
    """The numbers of an embedding."""
    return (specs["prior"].config.embedding_dim,)


def decode(networks: Networks, latents: jax.Array) -> jax.Array:
    """The embeddings [B, D] that samples of unit variance stand for."""
    return networks("prior", latents, method="post_process_latents")


PRIOR = Family(prepare, encode, predict, latent_shape, decode, loop=r"prior")


class PriorPipeline(DiffusionPipeline):
    """Embeddings of pictures from texts."""

    family = PRIOR
    task = staticmethod(embedding)
    defaults = {"num_inference_steps": 25, "guidance_scale": 4.0}
