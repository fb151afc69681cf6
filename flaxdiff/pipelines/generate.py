"""The one loop: from conditions and noise to pictures, for every family.

A `Program` is what gets compiled: the family's functions, the specs of its networks and the rule of guidance; hashable,
without weights, scheduler or tokenizer. Its methods are pure functions of (params, key, inputs). `generate` does all of
it in one program. `begin`, `step` and `decode` are its parts, for a host that wants to look on between steps.

`inputs` is a dictionary of arrays, made by a pipeline's `prepare_inputs`:
  index [B]       which image is which: image b draws from fold_in(key, index[b]), whatever device it is on
  plan            the scheduler's tables, padded so that other schedulers and step counts fit the same program
  size            `Size(height, width)` in pixels, part of the structure
  guidance        the strengths that the rule of guidance takes, by name: numbers, or one for each image
  cache           those of the cache
  latents, image, image_latents, noisy_latents    where to start, see `start`
  path [B, n, h, w, C]    or where another run passed, from its noise on, one sample before each evaluation
  noises [B, n, h, w, C]    the solver's unit noise at each evaluation, in place of what the keys give
  mask [B, h, w, 1]    1 where to paint over what the run starts from, which elsewhere is kept: see `blend.py`
  mask_noise           there, whatever it is, where each step draws the noise of what is kept
the name of a loop that is run before: its own inputs, a dictionary like this one, in whose place what it `gives` comes,
see `Earlier`;
decoder_… [B, …]    what the family's `decode` is told beside the latents, by the name that follows
what `beside.py` reads, and what the family's `encode` reads, e.g. prompt_ids; it finds there `keys` [B] as well, to
fold numbers in that nothing else does.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import core
from flaxdiff.caching import Answer, Cache, blank, evaluate
from flaxdiff.guidance import At, Guidance, standard
from flaxdiff.guidance.perturbed import levelled
from flaxdiff.guidance.rules import blocks
from flaxdiff.nn.reusing import Reuse
from flaxdiff.nn.skipping import Skip
from flaxdiff.parallel import constrain
from flaxdiff.pipelines.beside import KNOWN, tell
from flaxdiff.pipelines.blend import Known, Passed, blend
from flaxdiff.schedulers import tables

Inputs = Mapping[str, Any]
Cond = Mapping[str, jax.Array]  # what one branch tells the network


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Size:
    """Height and width in pixels: part of an input's structure, not of its values."""

    height: int
    width: int


# the names that the network in the loop may have; of several, the first is that of the last loop
DENOISERS = ("unet", "transformer", "super_res_first", "prior")
LOOPS = 2  # folded into an image's key for the loops before its own; to split it takes 0 and 1
AUTOENCODERS = ("vae", "vqvae")  # and those of the one between pictures and latents


def denoiser(components: Iterable[tuple[str, core.Spec]]) -> str:
    """The name of the network that the loop asks."""
    return next(name for name in DENOISERS if name in dict(components))


def autoencoder(names: Iterable[str]) -> str | None:
    """The name of the network between pictures and latents, if there is one.

    >>> autoencoder(["unet", "vqvae"])
    'vqvae'
    """
    return next((name for name in names if name in AUTOENCODERS), None)


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
        run = functools.partial(core.apply, self.specs[name], self.params[name], *args, **kwargs)
        if name in DENOISERS:
            return run()
        with contextlib.ExitStack() as unobserved:  # what is looked for, or left out, is of the network in the loop
            for variable in core.OBSERVERS:
                unobserved.enter_context(core.setting_of(variable, None))
            return run()

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
      decode: (networks, latents, …) -> images [B, H, W, 3] in [-1, 1], or a tree of such and of whole numbers; further
        arguments as `for_decoder` finds them.
      encode_image: (networks, images in [-1, 1], keys [B], spread = 1) -> latents, drawn with so much of the
        posterior's deviation; None where there is no way in.
      times: (networks, timesteps [N], cond) -> what the network makes of each time, [N, …], worked out once for all
        steps; None where it makes nothing of it that is worth keeping.
      distilled: (networks' specs, guidance_scale) -> what to tell a network that was distilled with guidance, arrays
        for the inputs, in place of a second branch; none for others. None where no network is.
      loop: regex of the names of the networks that `predict` calls.
      start: (networks, keys [B], inputs) -> the sample that the run starts from, of the kind that the scheduler is for,
        and None; None where it is of real numbers, see `Program.start`.
      schedule: (pipe, size, asked) -> what to ask of the scheduler's `plan`, on the host, from what was asked; None
        where that is it.
      pack: latents along each side that make one token, where the network's channels are those of tokens.
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
    start: Callable[..., tuple[jax.Array, None]] | None = None
    schedule: Callable[..., dict[str, Any]] | None = None
    pack: int = 1


class Conditions(NamedTuple):
    """What stays the same throughout a run."""

    branches: Mapping[str, Cond]
    strengths: Mapping[str, Any]  # of the guidance
    saving: Mapping[str, Any]  # those of the cache
    times: Any  # [rows of the plan, …], as the family's `predict` takes one; or None
    known: Known | Passed | None = None  # what a step is not to change
    noises: jax.Array | None = None  # [B, rows of the plan, …] that the solver is handed
    weaker: Any = None  # Conditions of a weaker network, where there is one

    def joined(self, names: Iterable[str]) -> Cond:
        """Some branches in one batch."""
        return jax.tree.map(_join, *(self.branches[name] for name in names))

    def at(self, row: jax.Array, names: tuple[str, ...]) -> Any:
        """What the family made of the time of a row, for some branches."""
        every = tuple(sorted(self.branches))
        chosen = np.array([every.index(name) for name in names])

        def of(times: jax.Array) -> jax.Array:
            a = times[row]
            if names == every or a.shape[0] == 1:  # the same for all
                return a
            return a.reshape(-1, len(every), *a.shape[1:])[:, chosen].reshape(-1, *a.shape[1:])

        return jax.tree.map(of, self.times)


def _join(*arrays: jax.Array) -> jax.Array:
    """Arrays [B, …] of the branches in one batch, an image's side by side: on its device, or each on one of its own."""
    stacked = constrain(jnp.stack(arrays, 1), "batch", "whole")
    return constrain(stacked.reshape(-1, *stacked.shape[2:]), "batch")


class State(NamedTuple):
    """Where a run stands between two evaluations of the network."""

    sampler: tables.SchedulerState | tables.Run
    guidance: Any
    kept: Any = ()  # by the cache


class Earlier(NamedTuple):
    """A loop that is run before another, for what that finds among its inputs.

    Attributes:
      name: where its own inputs lie among those of the other.
      gives: the name that its result has there, and among the inputs of the loops between.
      components: its name for a network -> the pipeline's.
      program: what is run.
    """

    name: str
    gives: str
    components: tuple[tuple[str, str], ...]
    program: "Program"


@dataclasses.dataclass(frozen=True)
class Program:
    """What gets compiled, see the module's paragraph.

    Attributes:
      before: the loops that are run first, in their order.
      final: whether what is decoded is a picture, and not what another loop goes on from.
    """

    family: Family
    specs: tuple[tuple[str, core.Spec], ...]
    guidance: Callable[..., Guidance] = standard
    cache: Callable[..., Cache] | None = None
    before: tuple[Earlier, ...] = ()
    final: bool = True

    def networks(self, params: Mapping[str, core.Params]) -> Networks:
        return Networks(dict(self.specs), params)

    def keys(self, key: jax.Array, index: jax.Array) -> list[jax.Array]:
        """The keys [B] of each loop before this one."""
        own = tables.image_keys(key, len(index), index) if self.before else key
        return [tables.folded(own, LOOPS + i) for i in range(len(self.before))]

    def prepared(
        self, run: Callable[..., Any], params: Mapping[str, core.Params], keys: Iterable[jax.Array], inputs: Inputs
    ) -> Inputs:
        """The inputs of this loop with what those before it find, each by `run(program, params, keys, inputs)`."""
        found: dict[str, Any] = {}
        for loop, own in zip(self.before, keys, strict=True):
            of_loop = {name: params[component] for name, component in loop.components}
            found[loop.gives] = run(loop.program, of_loop, own, {**inputs[loop.name], **found})
        return {k: v for k, v in inputs.items() if k not in {loop.name for loop in self.before}} | found

    def generate(self, params: Mapping[str, core.Params], key: jax.Array, inputs: Inputs) -> jax.Array:
        """Pictures [B, H, W, C], float32 in [0, 1]; or what another loop goes on from, as the family decodes it.

        Args:
          params: component -> parameters.
          key: one PRNG key, from which image b takes fold_in(key, index[b]), or one for each image [B].
          inputs: from `prepare_inputs`.
        """
        inputs = self.prepared(Program.generate, params, self.keys(key, inputs["index"]), inputs)
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
        networks, rule = self.networks(params), self.guidance(**inputs["guidance"])
        x, known = (self.family.start or self.start)(networks, keys[:, 0], inputs)
        told = self.family.encode(networks, {**inputs, "keys": keys[:, 0]})
        branches = levelled(rule.branches(tell(self.family, networks, keys[:, 0], inputs, told)))
        noises = inputs.get("noises")
        conditions = Conditions(branches, inputs["guidance"], inputs["cache"], None, known, noises)
        if self.family.times is not None:
            every = conditions.joined(sorted(conditions.branches))
            times = self.family.times(networks, jnp.asarray(inputs["plan"].timesteps), every)
            conditions = conditions._replace(times=times)
        if self.weaker in dict(self.specs):
            program, others = self.rival(params)
            conditions = conditions._replace(weaker=program.begin(others, key, inputs)[0])
        sampler = tables.init(inputs["plan"], x, keys[:, 1])
        if known is not None and isinstance(sampler, tables.Run):  # it sees to what is known itself
            sampler, conditions = sampler.knowing(known.latents, 1 - known.mask), conditions._replace(known=None)
        elif isinstance(known, Known) and known.keys is not None:
            sampler = blend(sampler, known)
        state = State(sampler, rule.init(x))
        if self.cache is not None:
            network = Evaluation(self, params, conditions, state.sampler)
            state = state._replace(kept=blank(self.cache(**inputs["cache"]), network))
        return conditions, state

    @property
    def weaker(self) -> str:
        """The name of the network that guidance may compare with the one in the loop."""
        return f"{denoiser(self.specs)}_weaker"

    def rival(self, params: Mapping[str, core.Params]) -> tuple["Program", Mapping[str, core.Params]]:
        """The same with the weaker network in the loop, and its parameters."""
        specs, own = dict(self.specs), denoiser(self.specs)
        specs[own] = specs.pop(self.weaker)
        return dataclasses.replace(self, specs=tuple(specs.items())), {**params, own: params[self.weaker]}

    def start(self, networks: Networks, keys: jax.Array, inputs: Inputs) -> tuple[jax.Array, Known | Passed | None]:
        """The sample [B, h, w, C] that the run starts from, and what of it is to stay where there is a `mask`.

        Noise drawn from the keys, or `latents` [B, h, w, C] in its place; or an `image` (pixels in [-1, 1]) or
        `image_latents` under the noise of the plan's first row, or under noise alone where `from_noise` [] says so; or
        `noisy_latents` as another run left them, or the first of a `path`.
        """
        plan = jax.tree.map(jnp.asarray, inputs["plan"])
        mask = jnp.asarray(inputs["mask"], jnp.float32) if "mask" in inputs else None
        if "path" in inputs:
            path = jnp.asarray(inputs["path"], jnp.float32)
            return path[:, 0], None if mask is None else Passed(mask, path)
        if "latents" in inputs:
            noise = jnp.asarray(inputs["latents"], jnp.float32)
        else:
            shape = self.family.latent_shape(networks.specs, inputs["size"])
            noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        given = [inputs[k] for k in ("image_latents", "noisy_latents") if k in inputs]
        if "image" in inputs:
            drawn = tables.folded(keys, 1)
            given = [self.family.encode_image(networks, inputs["image"], drawn)]
        if not given:
            return plan.init_noise_sigma * noise, None
        picture = jnp.asarray(given[0], jnp.float32)
        x = picture if "noisy_latents" in inputs else plan.alpha[0] * picture + plan.sigma[0] * noise
        if "from_noise" in inputs:
            x = jnp.where(inputs["from_noise"], plan.init_noise_sigma * noise, x)
        own = tables.folded(keys, KNOWN) if "mask_noise" in inputs else None
        return x, None if mask is None else Known(mask, picture, noise, own)

    def step(self, params: Mapping[str, core.Params], conditions: Conditions, state: State) -> State:
        """One evaluation of the network, and one row of the scheduler's table."""
        guess, state = self.guess(params, conditions, state)
        noise = None if conditions.noises is None else conditions.noises[:, state.sampler.index]
        sampler = tables.step(state.sampler, guess, noise)
        return state._replace(sampler=sampler if conditions.known is None else blend(sampler, conditions.known))

    def guess(self, params: Mapping[str, core.Params], conditions: Conditions, state: State) -> tuple[jax.Array, State]:
        """What the network says, all branches in one batch, as the rule of guidance joins it; and the state then."""
        sampler, rule = state.sampler, self.guidance(**conditions.strengths)
        network, kept = Evaluation(self, params, conditions, sampler), state.kept
        at = At(sampler, conditions.branches, network.another, lambda z: self.family.decode(network.networks, z))
        if conditions.weaker is not None:
            rival = Evaluation(*self.rival(params), conditions.weaker, sampler)
            at = at._replace(weaker=lambda x: rival.another(x, ["positive"]).predictions["positive"])
        x = rule.adjust(sampler.sample, at)
        if x is not sampler.sample:
            sampler = sampler.moved(x)
            network, at = network._replace(sampler=sampler), at._replace(sampler=sampler)
        if self.cache is None:
            answer, _ = network()
        else:
            answer, _ = kept = evaluate(self.cache(**conditions.saving), kept, network)
        at = at._replace(seen=answer.seen)
        predictions = of_sample(answer.predictions, sampler.sample)
        guess, memory = rule.combine(state.guidance, predictions["positive"], predictions, at)
        variance = answer.predictions["positive"][..., guess.shape[-1] :]  # where one is learned, it is not guided
        return jnp.concatenate([guess, variance], -1), State(sampler, memory, kept)

    def decode(
        self,
        params: Mapping[str, core.Params],
        latents: jax.Array,
        told: Mapping[str, jax.Array] = MappingProxyType({}),
    ) -> jax.Array:
        """Latents, and what inputs have for the decoder -> what `generate` returns."""

        def finished(x: jax.Array) -> jax.Array:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return jnp.clip(x.astype(jnp.float32) / 2 + 0.5, 0, 1) if self.final else x.astype(jnp.float32)

        return jax.tree.map(finished, self.family.decode(self.networks(params), latents, **told))


def of_sample(predictions: Mapping[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
    """Predictions without what a network says beside of real numbers: the variance, in channels after the sample's."""
    channels = x.shape[-1] if jnp.issubdtype(x.dtype, jnp.floating) else None
    return {branch: output[..., :channels] for branch, output in predictions.items()}


class Evaluation(NamedTuple):
    """The network at one evaluation, to be asked; see `caching.Network`."""

    program: Program
    params: Mapping[str, core.Params]
    conditions: Conditions
    sampler: tables.SchedulerState | tables.Run

    @property
    def networks(self) -> Networks:
        return self.program.networks(self.params)

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(sorted(self.conditions.branches))  # as in a dictionary that has been through `jit`

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """The names of the blocks that attend, stack by stack."""
        return blocks(dict(self.program.specs)[denoiser(self.program.specs)])

    @property
    def index(self) -> jax.Array:
        return self.sampler.index

    @property
    def steps(self) -> jax.Array:
        return self.sampler.plan.steps

    @property
    def timestep(self) -> jax.Array:
        return self.sampler.timestep

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(map(len, self.stacks))

    def __call__(
        self,
        branches: Iterable[str] | None = None,
        notes: Iterable[str] = (),
        skip: Skip | None = None,
        reuse: Reuse | None = None,
        **told: Any,
    ) -> tuple[Answer, dict[str, list]]:
        branches = self.branches if branches is None else tuple(sorted(branches))
        with core.setting_of(core.skipping, skip), core.setting_of(core.reusing, reuse):
            return self._ask(self.sampler.sample, branches, notes, told)

    def another(self, x: jax.Array, branches: Iterable[str]) -> Answer:
        """What the network says of another sample."""
        answer, _ = self._ask(x, tuple(sorted(branches)), (), {})
        return answer._replace(predictions=of_sample(answer.predictions, x))

    def _ask(
        self, x: jax.Array, branches: tuple[str, ...], notes: Iterable[str], told: Mapping[str, Any]
    ) -> tuple[Answer, dict[str, list]]:
        names = [name for stack in self.stacks for name in stack]
        wanted = self.program.guidance(**self.conditions.strengths).watches(names)
        with (
            core.setting_of(core.watched, [] if wanted and not told else None) as pairs,
            core.setting_of(core.noted, {kind: [] for kind in notes} or None) as kinds,
        ):
            predictions = self._predictions(x, branches, told)
        if pairs is not None and len(pairs) != 2 * len(names):
            raise ValueError(f"A rule of guidance watches attention, and {len(pairs)} of it have no known place.")
        of = lambda pair, i: tuple(a[i :: len(branches)] for a in pair)
        two = lambda name, i: tuple(of(pairs[2 * names.index(name) + half], i) for half in (0, 1))
        seen = pairs and {branch: {name: two(name, i) for name in wanted} for i, branch in enumerate(branches)}
        return Answer(predictions, seen), kinds or {}

    def _predictions(self, x: jax.Array, branches: tuple[str, ...], told: Mapping[str, Any]) -> dict[str, jax.Array]:
        """What the network says of a sample [B, h, w, C], by branch, in float32."""
        sampler, conditions, family = self.sampler, self.conditions, self.program.family
        cond = conditions.joined(branches) | told
        x = _join(*[sampler.scaled(x)] * len(branches))
        if "beside" in cond:
            x = jnp.concatenate([x, cond["beside"]], -1)
        t = sampler.timestep if conditions.times is None else conditions.at(sampler.index, branches)
        output = family.predict(self.networks, x, t, cond).astype(jnp.float32)
        output = constrain(output.reshape(-1, len(branches), *output.shape[1:]), "batch", "whole")
        return {branch: output[:, i] for i, branch in enumerate(branches)}
