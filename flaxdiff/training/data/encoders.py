"""A pipeline's own encoders as functions of captions and of batches: what `precompute` writes, for every family.

Texts are what the text encoders say. What the network in the loop makes of them before its first step is left out:
that network is what is trained.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxdiff import parallel
from flaxdiff.core import Params
from flaxdiff.pipelines.generate import DENOISERS, Networks
from flaxdiff.pipelines.tasks import native_size
from flaxdiff.schedulers.tables import folded, image_keys
from flaxdiff.training.data.batches import Batch, joined

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

# what the families' conditions are called where a call is given them
GIVEN = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_mask"}


class Encoders(Networks):
    """Networks of which the one in the loop makes nothing of a text: it is what is trained."""

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return args[0] if name in DENOISERS else super().__call__(name, *args, **kwargs)


def text_encoder(
    pipe: "DiffusionPipeline", params: Mapping[str, Params], mesh: Mesh, batch_size: int
) -> Callable[[Sequence[str]], Batch]:
    """Captions -> arrays [N, …] by the names that a call of the pipeline gives them, so many captions at a time."""
    size = native_size(pipe)
    takes = inspect.signature(pipe.family.prepare).parameters
    told = {name: value for name, value in {"guidance_scale": 1.0}.items() if name in takes}

    @jax.jit
    def run(params: Mapping[str, Params], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
        cond = pipe.family.encode(Encoders(dict(pipe.specs), params), {**inputs, "size": size})["positive"]
        return {GIVEN.get(name, name): value for name, value in cond.items() if name not in inputs}

    def read(captions: Sequence[str]) -> Batch:
        if "prompt" not in takes:
            return {}
        parts = []
        for at in range(0, len(captions), batch_size):
            part = list(captions[at : at + batch_size])
            filled = part + part[-1:] * (batch_size - len(part))
            inputs = pipe.family.prepare(pipe, size, False, prompt=filled, **told)
            found = jax.device_get(run(params, parallel.shard(repeated(inputs, batch_size), mesh)))
            parts.append({name: array[: len(part)] for name, array in found.items()})
        return joined(parts)

    return read


def repeated(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Inputs with a row for each caption where there was one for all; numbers stay."""
    rows = lambda a: np.repeat(a, batch, 0) if np.ndim(a) and len(a) == 1 else np.asarray(a)
    return {name: rows(a) for name, a in inputs.items()}


def image_encoder(
    pipe: "DiffusionPipeline", params: Mapping[str, Params], mesh: Mesh, images: Sequence[str], samples: int, seed: int
) -> Callable[[Batch], Batch]:
    """A batch -> the same with latents [B, samples, …] in the place of pictures, drawn by each example's own key."""

    @jax.jit
    def run(params: Mapping[str, Params], index: jax.Array, pixels: dict[str, jax.Array]) -> dict[str, jax.Array]:
        networks, keys = Networks(dict(pipe.specs), params), image_keys(jax.random.key(seed), len(index), index)
        draws = range(max(samples, 1))
        see = lambda x, i: pipe.family.encode_image(networks, x, folded(keys, i), 1.0 if samples else 0.0)
        return {name: jnp.stack([see(x, i) for i in draws], 1) for name, x in pixels.items()}

    def encode(batch: Batch) -> Batch:
        given = np.int32(batch["index"]), {name: batch[name] for name in images}
        seen = jax.device_get(run(params, *parallel.shard(given, mesh)))
        names = {name: f"{name}_latents" if i else "latents" for i, name in enumerate(images)}
        return {k: v for k, v in batch.items() if k not in images} | {names[k]: v for k, v in seen.items()}

    return encode
