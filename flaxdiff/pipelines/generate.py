"""The one loop: from conditions and noise to pictures, for every family.

A `Program` is what gets compiled: the family's functions, the specs of its networks and the rule of guidance; hashable,
without weights, scheduler or tokenizer. Its methods are pure functions of (params, key, inputs). `generate` does all of
it in one program. `begin`, `step` and `decode` are its parts, for a host that wants to look on between steps.

`inputs` is a dictionary of arrays, made by a pipeline's `prepare_inputs`:
  index [B]       which image is which: image b draws from fold_in(key, index[b]), whatever device it is on
  plan            the scheduler's tables, padded so that other schedulers and step counts fit the same program
  size            `Size(height, width)` in pixels, part of the structure
  guidance        {"guidance_scale", "guidance_rescale"}: numbers, or one for each image; absent without a second branch
  latents, image, image_latents, noisy_latents    where to start, see `start`
  mask [B, h, w, 1]    1 where to paint over what the run starts from, which elsewhere is kept: see `blend.py`
decoder_… [B, …]    what the family's `decode` is told beside the latents, by the name that follows
what `beside.py` reads, and what the family's `encode` reads, e.g. prompt_ids.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxdiff import core
from flaxdiff.guidance import Guidance, standard
from flaxdiff.parallel import constrain
from flaxdiff.pipelines.beside import tell
from flaxdiff.pipelines.blend import Known, blend
from flaxdiff.schedulers import tables

Inputs = Mapping[str, Any]
Cond = Mapping[str, jax.Array]  # what one branch tells the network


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Size:
    """Height and width in pixels: part of an input's structure, not of its values."""

    height: int
    width: int


def for_decoder(inputs: Inputs) -> dict[str, Any]:
    """What inputs have for the decoder beside the latents.

    >>> for_decoder({"decoder_mask": 1, "index": 2})
    {'mask': 1}
    """
    return {k.removeprefix("decoder_"): v for k, v in inputs.items() if k.startswith("decoder_")}


class Networks(NamedTuple):
    """The networks of a pipeline with their weights, for the functions of a family: `networks("unet", x, t, text)`."""

    specs: Mapping[str, core.Spec]
    params: Mapping[str, core.Params]

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return core.apply(self.specs[name], self.params[name], *args, **kwargs)

    def config(self, name: str) -> Any:
        return self.specs[name].config


class Family(NamedTuple):
    """What tells one family of models from another: a few functions, all but the first pure.

    Attributes:
      prepare: (pipe, size, guided, …) -> arrays for the inputs, on the host: the prompts as tokens. Its further
        parameters are what the pipeline's call takes for this family.
      encode: (networks, inputs) -> a `Cond` for each branch; "positive" always, "negative" when guided.
      predict: (networks, model_input [B, h, w, C], timestep [] or what `times` made of it, cond) -> the network's
        output.
      latent_shape: (networks' specs, size) -> (h, w, C).
      decode: (networks, latents, …) -> images [B, H, W, 3] in [-1, 1]; further arguments as `for_decoder` finds them.
      encode_image: (networks, images in [-1, 1], keys [B], spread = 1) -> latents, drawn with so much of the
        posterior's deviation; None where there is no way in.
      times: (networks, timesteps [N], cond) -> what the network makes of each time, [N, …], worked out once for all
        steps; None where it makes nothing of it that is worth keeping.
      distilled: (networks' specs, guidance_scale) -> what to tell a network that was distilled with guidance, arrays
        for the inputs, in place of a second branch; none for others. None where no network is.
      loop: regex of the names of the networks that `predict` calls.
    """

    prepare: Callable[..., dict[str, Any]]
    encode: Callable[[Networks, Inputs], Mapping[str, Cond]]
    predict: Callable[[Networks, jax.Array, Any, Cond], jax.Array]
    latent_shape: Callable[[Mapping[str, core.Spec], Size], tuple[int, int, int]]
    decode: Callable[..., jax.Array]
    encode_image: Callable[..., jax.Array] | None = None
    times: Callable[[Networks, jax.Array, Cond], Any] | None = None
    distilled: Callable[[Mapping[str, core.Spec], Any], dict[str, Any]] | None = None
    loop: str = r"unet|controlnet"


class Conditions(NamedTuple):
    """What stays the same throughout a run."""

    branches: Mapping[str, Cond]
    strengths: Mapping[str, jax.Array] | None  # of the guidance; None where there is but one branch
    times: Any  # [rows of the plan, …], as the family's `predict` takes one; or None
    known: Known | None = None  # what a step is not to change

    @property
    def joined(self) -> Cond:
        """All branches in one batch, in the order of their names: that of a dictionary that has been through `jit`."""
        return jax.tree.map(_join, *(self.branches[b] for b in sorted(self.branches)))


def _join(*arrays: jax.Array) -> jax.Array:
    """Arrays [B, …] of the branches in one batch, an image's side by side: on its device, or each on one of its own."""
    stacked = constrain(jnp.stack(arrays, 1), "batch", "whole")
    return constrain(stacked.reshape(-1, *stacked.shape[2:]), "batch")


class State(NamedTuple):
    """Where a run stands between two evaluations of the network."""

    sampler: tables.SchedulerState
    guidance: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """What gets compiled, see the module's paragraph."""

    family: Family
    specs: tuple[tuple[str, core.Spec], ...]
    guidance: Callable[[Mapping[str, jax.Array]], Guidance] = standard

    def networks(self, params: Mapping[str, core.Params]) -> Networks:
        return Networks(dict(self.specs), params)

    def generate(self, params: Mapping[str, core.Params], key: jax.Array, inputs: Inputs) -> jax.Array:
        """Pictures [B, H, W, C], float32 in [0, 1].

        Args:
          params: component -> parameters.
          key: one PRNG key, from which image b takes fold_in(key, index[b]), or one for each image [B].
          inputs: from `prepare_inputs`.
        """
        conditions, state = self.begin(params, key, inputs)
        # The table has a fixed length and the run its own: what is left of the table is skipped, not computed. A scan
        # and not a while loop, so that gradients flow; a step is recomputed on the way back, to keep only the latents.
        forward = jax.checkpoint(lambda state: self.step(params, conditions, state))

        def body(state, row):
            return jax.lax.cond(row < state.sampler.plan.steps, forward, lambda state: state, state), None

        state, _ = jax.lax.scan(body, state, jnp.arange(len(inputs["plan"].timesteps)))
        return self.decode(params, state.sampler.sample, for_decoder(inputs))

    def begin(self, params: Mapping[str, core.Params], key: jax.Array, inputs: Inputs) -> tuple[Conditions, State]:
        """What the network is told throughout, and the state before the first evaluation."""
        keys = jax.vmap(jax.random.split)(tables.image_keys(key, len(inputs["index"]), inputs["index"]))
        networks, strengths = self.networks(params), inputs.get("guidance")
        x, known = self.start(networks, keys[:, 0], inputs)
        memory = None if strengths is None else self.guidance(strengths).init(x)
        branches = tell(self.family, networks, keys[:, 0], inputs, self.family.encode(networks, inputs))
        conditions = Conditions(branches, strengths, None, known)
        if self.family.times is not None:
            times = self.family.times(networks, jnp.asarray(inputs["plan"].timesteps), conditions.joined)
            conditions = conditions._replace(times=times)
        return conditions, State(tables.init(inputs["plan"], x, keys[:, 1]), memory)

    def start(self, networks: Networks, keys: jax.Array, inputs: Inputs) -> tuple[jax.Array, Known | None]:
        """The sample [B, h, w, C] that the run starts from, and what of it is to stay where there is a `mask`.

        Noise drawn from the keys, or `latents` [B, h, w, C] in its place; or an `image` (pixels in [-1, 1]) or
        `image_latents` under the noise of the plan's first row, or under noise alone where `from_noise` [] says so; or
        `noisy_latents` as another run left them.
        """
        plan = jax.tree.map(jnp.asarray, inputs["plan"])
        if "latents" in inputs:
            noise = jnp.asarray(inputs["latents"], jnp.float32)
        else:
            shape = self.family.latent_shape(networks.specs, inputs["size"])
            noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        given = [inputs[k] for k in ("image_latents", "noisy_latents") if k in inputs]
        if "image" in inputs:
            drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
            given = [self.family.encode_image(networks, inputs["image"], drawn)]
        if not given:
            return plan.init_noise_sigma * noise, None
        picture = jnp.asarray(given[0], jnp.float32)
        x = picture if "noisy_latents" in inputs else plan.alpha[0] * picture + plan.sigma[0] * noise
        if "from_noise" in inputs:
            x = jnp.where(inputs["from_noise"], plan.init_noise_sigma * noise, x)
        return x, Known(jnp.asarray(inputs["mask"], jnp.float32), picture, noise) if "mask" in inputs else None

    def step(self, params: Mapping[str, core.Params], conditions: Conditions, state: State) -> State:
        """One evaluation of the network, all branches in one batch, and one row of the scheduler's table."""
        sampler, (branches, strengths, times, known), cond = state.sampler, conditions, conditions.joined
        x = _join(*[sampler.model_input] * len(branches))
        if "beside" in cond:
            x = jnp.concatenate([x, cond["beside"]], -1)
        t = sampler.timestep if times is None else jax.tree.map(lambda a: a[sampler.index], times)
        output = self.family.predict(self.networks(params), x, t, cond).astype(jnp.float32)
        output = constrain(output.reshape(-1, len(branches), *output.shape[1:]), "batch", "whole")
        predictions = {branch: output[:, i] for i, branch in enumerate(sorted(branches))}
        guess, memory = predictions["positive"], state.guidance
        if strengths is not None:
            guess, memory = self.guidance(strengths).combine(memory, guess, predictions)
        sampler = tables.step(sampler, guess)
        return State(sampler if known is None else blend(sampler, known), memory)

    def decode(
        self,
        params: Mapping[str, core.Params],
        latents: jax.Array,
        told: Mapping[str, jax.Array] = MappingProxyType({}),
    ) -> jax.Array:
        """Latents, and what inputs have for the decoder -> pictures [B, H, W, C], float32 in [0, 1]."""
        images = self.family.decode(self.networks(params), latents, **told)
        return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
