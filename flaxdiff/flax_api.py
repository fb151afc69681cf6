"""For those who come from diffusers' Flax classes: the same calls, over the pipeline that exists.

`FlaxStableDiffusionPipeline` keeps the call shapes of the removed class: prompts as ids, the scheduler's state among
the parameters, arrays with a leading axis of devices for `jit=True`. A call puts the ids into what
`StableDiffusionPipeline.prepare_inputs` makes and hands that to its `generate`; there is no second implementation.

A scheduler's state used to be tables. Here the table, a `Plan`, depends on the number of steps, which only the call
knows: so the state names the scheduler, and every call makes its plan. Two more things differ: the noise of a key
(image b of a device is drawn from fold_in(key, b)), and that there is no safety checker.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flaxdiff import images as pictures
from flaxdiff import schedulers
from flaxdiff.checkpoint import hub, load_pipeline
from flaxdiff.checkpoint.pipelines import SCHEDULER
from flaxdiff.pipelines.generate import Inputs, Program
from flaxdiff.pipelines.stable_diffusion import StableDiffusionPipeline


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FlaxSchedulerState:
    """What `params["scheduler"]` holds: a pytree without leaves, so that `replicate` leaves it as it is."""

    scheduler: schedulers.Scheduler


class FlaxScheduler(NamedTuple):
    """What stands in for a Flax scheduler class: it loads a scheduler of today.

    >>> import flaxdiff
    >>> scheduler, state = FlaxDDIMScheduler.from_pretrained(flaxdiff.EMOJI, subfolder="scheduler")
    >>> type(scheduler).__name__, state.scheduler == scheduler
    ('DDIMScheduler', True)
    """

    scheduler_class: type[schedulers.Scheduler]

    def from_pretrained(
        self, repo: str | os.PathLike[str], subfolder: str = "", *, revision: str | None = None, **changes: Any
    ) -> tuple[schedulers.Scheduler, FlaxSchedulerState]:
        """The scheduler with the options in a folder or Hub repository, whichever scheduler wrote them, but for
        `changes`; and its state for `params["scheduler"]`."""
        folder = hub.fetch(repo, [f"{subfolder}/{SCHEDULER}".lstrip("/")], revision=revision)
        scheduler = self.scheduler_class.from_pretrained(folder, subfolder=subfolder, **changes)
        return scheduler, FlaxSchedulerState(scheduler)


FlaxDDIMScheduler = FlaxScheduler(schedulers.DDIMScheduler)
FlaxDDPMScheduler = FlaxScheduler(schedulers.DDPMScheduler)
FlaxDPMSolverMultistepScheduler = FlaxScheduler(schedulers.DPMSolverMultistepScheduler)
FlaxEulerDiscreteScheduler = FlaxScheduler(schedulers.EulerDiscreteScheduler)
FlaxLMSDiscreteScheduler = FlaxScheduler(schedulers.LMSDiscreteScheduler)
FlaxPNDMScheduler = FlaxScheduler(schedulers.PNDMScheduler)


class FlaxStableDiffusionPipelineOutput(NamedTuple):
    """What a call returns: pictures, NumPy float32 in [0, 1], and False, since nothing checks what they show."""

    images: np.ndarray
    nsfw_content_detected: bool = False


def _run(program: Program, params: Mapping[str, Any], key: jax.Array, shared: Inputs, own: Inputs) -> jax.Array:
    return program.generate(params, key, shared | own)


_on_one_device = jax.jit(_run, static_argnums=0)
_on_each_device = jax.pmap(_run, static_broadcasted_argnums=0, in_axes=(None, 0, 0, None, 0))


@dataclasses.dataclass(frozen=True)
class FlaxStableDiffusionPipeline:
    """Text to image with Stable Diffusion 1 or 2, called as diffusers' Flax class was; `pipe` does the work.

    >>> import flaxdiff
    >>> pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(flaxdiff.EMOJI, dtype=jnp.float32)
    >>> prompt_ids = pipeline.prepare_inputs(["red apple"] * 2)
    >>> pipeline(prompt_ids, params, jax.random.PRNGKey(0), num_inference_steps=2).images.shape
    (2, 64, 64, 3)
    """

    pipe: StableDiffusionPipeline

    @classmethod
    def from_pretrained(
        cls, repo: str | os.PathLike[str], *, variant: str | None = None, **options: Any
    ) -> tuple[Self, dict[str, Any]]:
        """A pipeline and its parameters, the scheduler's state among them; options as of `checkpoint.load_pipeline`.

        Where there are no files of the variant, the plain ones are read, as the removed class did.
        """
        try:
            pipe, params = load_pipeline(StableDiffusionPipeline, repo, variant=variant, **options)
        except FileNotFoundError:
            if variant is None:
                raise
            pipe, params = load_pipeline(StableDiffusionPipeline, repo, **options)
        return cls(pipe), {**params, "scheduler": FlaxSchedulerState(pipe.scheduler)}

    def prepare_inputs(self, prompt: str | Sequence[str]) -> np.ndarray:
        """Prompts as token ids [B, N] int32; N is what the text encoder reads, 77 in Stable Diffusion."""
        return self.pipe.prepare_inputs(prompt)["prompt_ids"]

    def __call__(
        self,
        prompt_ids: jax.Array,
        params: Mapping[str, Any],
        prng_seed: jax.Array,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | jax.Array = 7.5,
        latents: jax.Array | None = None,
        neg_prompt_ids: jax.Array | None = None,
        return_dict: bool = True,
        jit: bool = False,
    ) -> FlaxStableDiffusionPipelineOutput | tuple[np.ndarray, bool]:
        """Make pictures [B, H, W, 3]; one compiled program serves every scheduler and number of steps.

        Args:
          prompt_ids: [B, N] from `prepare_inputs`.
          params: component -> parameters, and the scheduler's state.
          prng_seed: one PRNG key, of the old sort or the new.
          num_inference_steps, height, width: as of `StableDiffusionPipeline.prepare_inputs`.
          guidance_scale: strength of the prompt, one number or one for each image [B].
          latents: noise to start from, of unit variance, [B, C, h, w]: the channels are where that class had them.
          neg_prompt_ids: what to avoid, as `prompt_ids`; by default the empty text.
          return_dict: a plain tuple if False.
          jit: run on several devices by `jax.pmap`. Then all arrays, parameters, keys and pictures included, have an
            axis of devices in front, as `replicate` and `shard` give them one.

        Raises:
          ValueError: shapes that do not go together, or no state of a scheduler among the parameters.
        """
        scheduler, params = _split(params)
        _check_axes(prompt_ids, params, prng_seed, jit)
        asked = (num_inference_steps, height, width, guidance_scale, latents, neg_prompt_ids)
        run = _on_each_device if jit else _on_one_device
        images = run(self.pipe.program, params, prng_seed, *self._inputs(scheduler, prompt_ids, *asked))
        output = FlaxStableDiffusionPipelineOutput(np.asarray(images))
        return output if return_dict else tuple(output)

    def _generate(
        self, prompt_ids: jax.Array, params: Mapping[str, Any], prng_seed: jax.Array, *asked: Any, **named: Any
    ) -> jax.Array:
        """The pure function behind a call, for `jax.pmap`; of its arguments, steps, height and width are static."""
        scheduler, params = _split(params)
        return _run(self.pipe.program, params, prng_seed, *self._inputs(scheduler, prompt_ids, *asked, **named))

    def _inputs(
        self,
        scheduler: schedulers.Scheduler,
        prompt_ids: jax.Array,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | jax.Array = 7.5,
        latents: jax.Array | None = None,
        neg_prompt_ids: jax.Array | None = None,
    ) -> tuple[Inputs, Inputs]:
        """The inputs of `generate`: what all devices share, and what has the first axes of `prompt_ids`."""
        *lead, length = np.shape(prompt_ids)
        pipe = self.pipe.replace(scheduler=scheduler)
        # As that class did, evaluate both branches whatever the strength, which may be traced.
        options = {"num_inference_steps": num_inference_steps, "height": height, "width": width, "guidance_scale": 7.5}
        shared = pipe.prepare_inputs([""] * lead[-1], **options)
        empty, _, _ = (shared.pop(name) for name in ("negative_prompt_ids", "prompt_ids", "guidance"))
        h, w, c = pipe.family.latent_shape(dict(pipe.specs), shared["size"])
        for name, array, shape in (
            ("prompt_ids", prompt_ids, (*lead, empty.shape[1])),
            ("neg_prompt_ids", neg_prompt_ids, (*lead, length)),
            ("latents", latents, (*lead, c, h, w)),
        ):
            if array is not None and np.shape(array) != shape:
                raise ValueError(f"{name} have shape {np.shape(array)}; expected {shape}, for as many prompts.")
        scale = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), lead)
        negative = jnp.broadcast_to(empty if neg_prompt_ids is None else neg_prompt_ids, (*lead, length))
        own = {"prompt_ids": prompt_ids, "negative_prompt_ids": negative}
        own["guidance"] = {"guidance_scale": scale, "guidance_rescale": jnp.zeros_like(scale)}
        if latents is not None:
            own["latents"] = jnp.moveaxis(jnp.asarray(latents), -3, -1)
        return shared, own

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Arrays [B, H, W, 3], or one [H, W, 3], in [0, 1] as pictures."""
        return pictures.to_pil(np.asarray(images).reshape(-1, *np.shape(images)[-3:]))


def _split(params: Mapping[str, Any]) -> tuple[schedulers.Scheduler, dict[str, Any]]:
    """The scheduler that the state names, and the networks' parameters."""
    state = params.get("scheduler")
    if not isinstance(state, FlaxSchedulerState):
        raise ValueError(
            f"params['scheduler'] is a {type(state).__name__}; put a state there, as in "
            "scheduler, params['scheduler'] = FlaxDDIMScheduler.from_pretrained(…, subfolder='scheduler')."
        )
    return state.scheduler, {name: value for name, value in params.items() if name != "scheduler"}


def _check_axes(prompt_ids: jax.Array, params: Mapping[str, Any], key: jax.Array, jit: bool) -> None:
    """Raise ValueError unless there are ids, and with `jit` parameters and a key for each of their devices."""
    if np.ndim(prompt_ids) != 2 + jit:
        expected = "[devices, B, N], as shard returns them, with jit=True" if jit else "[B, N], or jit=True"
        raise ValueError(f"prompt_ids have shape {np.shape(prompt_ids)}; expected {expected}.")
    n, typed = len(prompt_ids), jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if jit and (key.shape if typed else key.shape[:-1])[:1] != (n,):
        raise ValueError(f"prng_seed has shape {key.shape}; {n} devices need a key each: jax.random.split(key, {n}).")
    if jit and any(np.shape(leaf)[:1] != (n,) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"params lack the axis of {n} devices; give replicate(params).")
