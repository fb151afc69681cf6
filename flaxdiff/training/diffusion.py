"""Any pipeline as something to train: its network, asked about noisy pictures as a run asks it.

What a run prepares on the host and encodes on the device (prompts, sizes, a picture to follow or to change) is what
training conditions on. So one loss serves every family, and ControlNets, adapters and LoRA with them: they are other
components, or other weights, of the same pipeline.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.pipelines.beside import tell
from flaxdiff.pipelines.generate import Inputs, Networks
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.schedulers.tables import folded, image_keys
from flaxdiff.training.losses import Predict
from flaxdiff.training.state import Loss

TOLD = 1  # folded into an image's key for what is drawn of its conditions
OF_RUN = ("plan", "guidance", "cache", "latents")  # of the inputs of a run, what has no part in training


class Once(NamedTuple):
    """In the place of a scheduler's plan: one evaluation."""

    timesteps: np.ndarray = np.zeros(1, np.float32)
    steps: int = 1


def conditions(pipe: DiffusionPipeline, **options: Any) -> dict[str, Any]:
    """What a pipeline's networks are told, as arrays: on the host.

    Args:
      pipe: the pipeline.
      **options: of its call, for a batch: `prompt`, `height`, `image` of a ControlNet, …; by default without guidance.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.load()
    >>> conditions(pipe, prompt=["red apple", "blue book"])["prompt_ids"].shape
    (2, 32)
    """
    asked = {"guidance_scale": 1.0, pipe.asks: 1.0, "num_inference_steps": 1}
    inputs = pipe.prepare_inputs(**{**asked, **options})
    return {name: value for name, value in inputs.items() if name not in OF_RUN}


def wordless(pipe: DiffusionPipeline, side: int) -> dict[str, Any]:
    """The conditions of one example without a text, as far as they are of the text: for `distillation.emptied`.

    Where the negative branch of a run is zeros in place of an empty text, so is this.
    """
    empty = conditions(pipe, prompt=[""], height=side, width=side)
    told = {name: value[0] for name, value in empty.items() if "prompt_" in name}
    return {"conditions": told | ({"keep": empty["negative_keep"]} if "negative_keep" in empty else {})}


def told(pipe: DiffusionPipeline, networks: Networks, keys: jax.Array, inputs: Inputs) -> dict[str, Any]:
    """What the positive branch of a run tells the network, of `conditions`."""
    inputs = {**inputs, "keys": keys, "plan": Once(), "guidance": {}}
    return dict(tell(pipe.family, networks, keys, inputs, pipe.family.encode(networks, inputs))["positive"])


def predict(pipe: DiffusionPipeline) -> Predict:
    """`(params, x_t, t, batch) -> prediction` of a pipeline's network, for `losses.denoising`.

    The batch holds "conditions", a key for each example, "keys", and perhaps "timestep_cond", which is told as well.
    Text encoders are asked with the denoiser, each with the parameters as they are: so they learn with it where they
    are trained, and a teacher reads the text itself. A variance that is predicted beside is left out.
    """
    family = pipe.family

    def of(params: Any, x: jax.Array, t: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
        networks = pipe.program.networks(params)
        more = {name: batch[name] for name in ("timestep_cond",) if name in batch}
        cond = told(pipe, networks, folded(batch["keys"], TOLD), {**batch["conditions"], **more})
        seen = jnp.concatenate([x, cond["beside"].astype(x.dtype)], -1) if "beside" in cond else x
        if family.times is not None:  # of each example's own time and conditions
            one = lambda t, cond: family.times(networks, t[None], jax.tree.map(lambda a: a[None], cond))
            t = jax.tree.map(lambda a: a[:, 0, 0], jax.vmap(one)(t, cond))
        return family.predict(networks, seen, t, cond)[..., : x.shape[-1]]

    return of


def encoded(pipe: DiffusionPipeline, loss: Loss) -> Loss:
    """A loss of "latents" as one of pictures, "image"; and each example gets a key. Latents that are there stay."""

    def of(params: Any, batch: Mapping[str, Any], key: jax.Array) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        key, own = jax.random.split(key)
        batch = dict(batch)
        keys = image_keys(own, len(batch["latents"] if "latents" in batch else batch["image"]))
        if "latents" not in batch:
            networks = pipe.program.networks(params)
            batch["latents"] = pipe.family.encode_image(networks, batch.pop("image"), keys)
        return loss(params, {**batch, "keys": keys}, key)

    return of
