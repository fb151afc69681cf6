"""Flux Redux: pictures as prompts. It makes what Flux is told of pictures and perhaps of a text, without a loop.

Reference: Black Forest Labs, FLUX.1 Tools, 2024.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.core import Params
from flaxdiff.pipelines import flux
from flaxdiff.pipelines.generate import Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline

POOLED = 768  # channels of CLIP's pooled state


class FluxPriorReduxPipelineOutput(dict[str, jax.Array]):
    """What Flux's pipelines take: the text and its pooled state, by name or as attributes.

    >>> FluxPriorReduxPipelineOutput(prompt_embeds=1).prompt_embeds
    1
    """

    __getattr__ = dict.__getitem__


def encode(networks: Networks, inputs: Inputs) -> dict[str, jax.Array]:
    """Text and pictures side by side, weighed and added up over the pictures: [1, N + M, D] and [1, P]."""
    seen = networks("image_encoder", inputs["pixels"]).last_hidden_state
    shown = networks("image_embedder", seen)
    if "prompt_ids" in inputs or "prompt_embeds" in inputs:
        told = flux.encode(networks, inputs)["positive"]
    else:
        text = jnp.zeros((1, flux.LONGEST, shown.shape[-1]), shown.dtype)
        told = {"text": text, "pooled": jnp.zeros((1, POOLED), shown.dtype)}
    each = lambda a: jnp.broadcast_to(a, (len(shown), *a.shape[1:])).astype(shown.dtype)
    text = jnp.concatenate([each(told["text"]), shown], 1)
    added = lambda a, scale: jnp.einsum("b...,b->...", a, jnp.broadcast_to(scale, len(a)).astype(a.dtype))[None]
    return {
        "prompt_embeds": added(text, inputs["prompt_embeds_scale"]),
        "pooled_prompt_embeds": added(each(told["pooled"]), inputs["pooled_prompt_embeds_scale"]),
    }


class FluxPriorReduxPipeline(DiffusionPipeline):
    """Pictures as prompts for Flux: `pipe(params, image=…)` gives what a call of `FluxPipeline` takes by `**`."""

    family, sampler, reads = flux.FLUX, None, ("image_encoder",)
    defaults = {}

    @property
    def program(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} has no loop: call it, and give a pipeline of Flux what it returns.")

    def prepare_inputs(
        self,
        image: Any,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_embeds: jax.Array | None = None,
        pooled_prompt_embeds: jax.Array | None = None,
        prompt_embeds_scale: float | Sequence[float] = 1.0,
        pooled_prompt_embeds_scale: float | Sequence[float] = 1.0,
    ) -> dict[str, Any]:
        """What the networks read, on the host.

        Args:
          image: pictures, Pillow's, or arrays [B, H, W, 3] in [0, 1].
          prompt, prompt_2, prompt_embeds, pooled_prompt_embeds: a text beside them, one or one for each picture, as of
            Flux; without one, or without text encoders, there is none.
          prompt_embeds_scale, pooled_prompt_embeds_scale: how much each picture counts, one number or one for each.

        Raises:
          ValueError: not one text, or one scale, for each picture.
        """
        arrays: dict[str, Any] = {"pixels": pictures.square_pixels(image, self.image_encoder.config.image_size)}
        if prompt is not None and "text_encoder" in dict(self.specs) or prompt_embeds is not None:
            texts = prompt, prompt_2, None, None, prompt_embeds, None, pooled_prompt_embeds
            arrays |= flux.prepare(self, Size(0, 0), False, *texts)
        arrays["prompt_embeds_scale"] = np.atleast_1d(np.float32(prompt_embeds_scale))
        arrays["pooled_prompt_embeds_scale"] = np.atleast_1d(np.float32(pooled_prompt_embeds_scale))
        for name, array in arrays.items():
            if len(array) not in (1, len(arrays["pixels"])):
                count = len(arrays["pixels"])
                raise ValueError(f"{name} has {len(array)} entries for {count} pictures; give one, or one for each.")
        return arrays

    def __call__(self, params: Mapping[str, Params], image: Any, **options: Any) -> FluxPriorReduxPipelineOutput:
        """What Flux is told of pictures; options as of `prepare_inputs`."""
        return FluxPriorReduxPipelineOutput(_encode(self.specs, dict(params), self.prepare_inputs(image, **options)))


_encode = jax.jit(lambda specs, params, inputs: encode(Networks(dict(specs), params), inputs), static_argnums=0)
