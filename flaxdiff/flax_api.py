"""For those who come from diffusers' Flax classes: the same calls, over the pipelines and networks that exist.

The classes keep the call shapes of the removed ones: prompts as ids, pictures with their channels in front, the
scheduler's state among the parameters, arrays with a leading axis of devices for `jit=True`. A call puts what it is
given into what the pipeline's `prepare_inputs` makes, and hands that to its `generate`; there is no second
implementation.

A scheduler's state used to be tables. Here the table, a `Plan`, depends on the number of steps, which only the call
knows: so the state names the scheduler, and every call makes its plan. The noise of a key differs too: image b of a
device is drawn from fold_in(key, b).
"""

import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flaxdiff import images as pictures
from flaxdiff import registry, schedulers
from flaxdiff.checkpoint import hub, load_pipeline
from flaxdiff.checkpoint.pipelines import SCHEDULER
from flaxdiff.flax_models import FlaxModelMixin, last
from flaxdiff.pipelines.afterwards import CHECKER, checked
from flaxdiff.pipelines.controlled import StableDiffusionControlNetPipeline
from flaxdiff.pipelines.generate import Inputs, Program
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.stable_diffusion import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from flaxdiff.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from flaxdiff.pipelines.tasks import check_channels, vae_factor
from flaxdiff.pipelines.text import check_prompts, texts


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
    """What a call returns: pictures, NumPy float32 in [0, 1], and which a checker flagged; False if none looked."""

    images: np.ndarray
    nsfw_content_detected: list[bool] | bool = False


FlaxStableDiffusionControlNetPipelineOutput = FlaxImagePipelineOutput = FlaxStableDiffusionPipelineOutput


def _run(program: Program, params: Mapping[str, Any], key: jax.Array, shared: Inputs, own: Inputs) -> jax.Array:
    return program.generate(params, key, shared | own)


_on_one_device = jax.jit(_run, static_argnums=0)
_on_each_device = jax.pmap(_run, static_broadcasted_argnums=0, in_axes=(None, 0, 0, None, 0))


DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 7.5, "strength": 0.8, "controlnet_conditioning_scale": 1.0}
DEFAULTS |= dict.fromkeys(("height", "width", "latents", "noise", "neg_prompt_ids")) | {
    "return_dict": True,
    "jit": False,
}


@dataclasses.dataclass(frozen=True)
class FlaxDiffusionPipeline:
    """The base of the Flax pipelines; `pipe` does the work. Its `from_pretrained` finds the class for a checkpoint.

    Attributes:
      takes: what a call is given, in order:
        prompt_ids: [B, N] from `prepare_inputs`; [B, 2, N] with two text encoders.
        image, mask, masked_image: [B, C, H, W] from there too.
        params: component -> parameters, and the scheduler's state.
        prng_seed: one PRNG key, of the old sort or the new.
        num_inference_steps, height, width, strength, …: as of the pipeline's `prepare_inputs`.
        guidance_scale: strength of the prompt, one number or one for each image [B].
        latents, noise: to start from, of unit variance, [B, C, h, w].
        neg_prompt_ids: what to avoid, as `prompt_ids`; by default the empty text.
        return_dict: a plain tuple if False.
        jit: run on several devices by `jax.pmap`. Then all arrays, parameters, keys and pictures included, have an
          axis of devices in front, as `replicate` and `shard` give them one.
      encoders: how many read the text.
    """

    pipe: DiffusionPipeline
    pipeline_class: ClassVar[type[DiffusionPipeline]] = DiffusionPipeline
    takes: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[int] = 1

    @classmethod
    def from_pretrained(
        cls, repo: str | os.PathLike[str], *, variant: str | None = None, **options: Any
    ) -> tuple[Self, dict[str, Any]]:
        """A pipeline and its parameters, the scheduler's state among them; options as of `checkpoint.load_pipeline`.

        Where there are no files of the variant, the plain ones are read, as the removed class did. A Flax network, such
        as `controlnet=`, brings no parameters: put them into `params` under that name.
        """
        later = [name for name, part in options.items() if isinstance(part, FlaxModelMixin)]
        options |= {name: (options[name].spec, {}) for name in later}
        try:
            pipe, params = load_pipeline(cls.pipeline_class, repo, variant=variant, **options)
        except FileNotFoundError:
            if variant is None:
                raise
            pipe, params = load_pipeline(cls.pipeline_class, repo, **options)
        made = cls if cls is not FlaxDiffusionPipeline else registry.find(f"Flax{type(pipe).__name__}", "flax")
        params = {name: own for name, own in params.items() if name not in later}
        return made(pipe), {**params, "scheduler": FlaxSchedulerState(pipe.scheduler)}

    def prepare_text_inputs(self, prompt: str | Sequence[str]) -> np.ndarray:
        """Prompts as token ids [B, N] int32; N is what the text encoder reads, 77 in Stable Diffusion."""
        read = texts(check_prompts(self.pipe, prompt, None))
        ids = [tokenizer(read) for _, tokenizer in self.pipe.tokenizers]
        return ids[0] if self.encoders == 1 else np.stack(ids, 1)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Arrays [B, H, W, 3], or one [H, W, 3], in [0, 1] as pictures."""
        return pictures.to_pil(np.asarray(images).reshape(-1, *np.shape(images)[-3:]))

    def __call__(self, *args: Any, **named: Any) -> FlaxStableDiffusionPipelineOutput | tuple[np.ndarray, bool]:
        """Make pictures [B, H, W, 3]; one compiled program serves every scheduler and number of steps.

        Args:
          *args, **named: what the class `takes`.

        Raises:
          TypeError: something is missing, or is not taken.
          ValueError: shapes that do not go together, or no state of a scheduler, or no network, among the parameters.
        """
        plain, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        accepted = [inspect.Parameter(name, plain, default=DEFAULTS.get(name, empty)) for name in self.takes]
        bound = inspect.Signature(accepted).bind(*args, **named)
        bound.apply_defaults()
        asked = dict(bound.arguments)
        params, key, return_dict, jit = (asked.pop(name) for name in ("params", "prng_seed", "return_dict", "jit"))
        scheduler, params = _split(params)
        if absent := [name for name, _ in self.pipe.specs if name not in params]:
            raise ValueError(f"params lack {', '.join(absent)}; put the parameters there: params[{absent[0]!r}] = ….")
        _check_axes(asked["prompt_ids"], params, key, jit, self.encoders)
        run = _on_each_device if jit else _on_one_device
        images = np.asarray(run(self.pipe.program, params, key, *self._inputs(scheduler, **self._told(**asked))))
        of_one = {k: jax.tree.map(lambda a: a[0], own) for k, own in params.items() if k == CHECKER} if jit else params
        flat, flags = checked(self.pipe, of_one, images.reshape(-1, *images.shape[-3:]))
        output = FlaxStableDiffusionPipelineOutput(flat.reshape(images.shape), flags or False)
        return output if return_dict else tuple(output)

    def _told(self, **asked: Any) -> dict[str, Any]:
        """What a call was asked for, as arguments of `_inputs`."""
        return asked

    def _inputs(
        self,
        scheduler: schedulers.Scheduler,
        prompt_ids: jax.Array,
        *,
        guidance_scale: float | jax.Array = 7.5,
        latents: jax.Array | None = None,
        neg_prompt_ids: jax.Array | None = None,
        given: Mapping[str, tuple[jax.Array, int]] = MappingProxyType({}),
        filled: Mapping[str, jax.Array] = MappingProxyType({}),
        **options: Any,
    ) -> tuple[Inputs, Inputs]:
        """The inputs of `generate`: what all devices share, and what has the first axes of `prompt_ids`.

        Args:
          given: pictures of a call, [..., B, C, H, W], each with the channels that it must have.
          filled: what they become among the inputs.
          **options: of the pipeline's `prepare_inputs`, the same for all; blank pictures among them.
        """
        lead, axes = np.shape(prompt_ids)[: -self.encoders], self.encoders
        pipe = self.pipe.replace(scheduler=scheduler)
        # As those classes did, evaluate both branches whatever the strength, which may be traced.
        negative = None if neg_prompt_ids is None else [""] * lead[-1]
        shared = pipe.prepare_inputs([""] * lead[-1], negative_prompt=negative, guidance_scale=7.5, **options)
        shared.pop("guidance")
        read = [name for name in ("prompt_ids", "prompt_ids_2") if name in shared]
        empty = [shared.pop(f"negative_{name}") for name in read]
        size, (h, w, c) = shared["size"], pipe.family.latent_shape(dict(pipe.specs), shared["size"])
        ids = (*lead, *(() if axes == 1 else (axes,)), empty[0].shape[1])
        for name, array, shape in (
            ("prompt_ids", prompt_ids, ids),
            ("neg_prompt_ids", neg_prompt_ids, ids),
            ("latents", latents, (*lead, c, h, w)),
            *((name, array, (*lead, n, size.height, size.width)) for name, (array, n) in given.items()),
        ):
            if array is not None and np.shape(array) != shape:
                raise ValueError(f"{name} have shape {np.shape(array)}; expected {shape}, for as many prompts.")
        scale = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), lead)
        own = {"guidance": {"guidance_scale": scale, "guidance_rescale": jnp.zeros_like(scale)}, **filled}
        for i, name in enumerate(read):
            of_one = lambda a, i=i: a if axes == 1 else a[..., i, :]
            own[name] = of_one(prompt_ids)
            avoided = empty[i] if neg_prompt_ids is None else of_one(neg_prompt_ids)
            own[f"negative_{name}"] = jnp.broadcast_to(avoided, own[name].shape)
        if latents is not None:
            own["latents"] = last(latents)
        return {name: value for name, value in shared.items() if name not in own}, own


class FlaxStableDiffusionPipeline(FlaxDiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2.

    >>> import flaxdiff
    >>> pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(flaxdiff.EMOJI, dtype=jnp.float32)
    >>> prompt_ids = pipeline.prepare_inputs(["red apple"] * 2)
    >>> pipeline(prompt_ids, params, jax.random.PRNGKey(0), num_inference_steps=2).images.shape
    (2, 64, 64, 3)
    """

    pipeline_class = StableDiffusionPipeline
    takes = ("prompt_ids", "params", "prng_seed", "num_inference_steps", "height", "width", "guidance_scale", "latents")
    takes += ("neg_prompt_ids", "return_dict", "jit")
    prepare_inputs = FlaxDiffusionPipeline.prepare_text_inputs

    def _generate(
        self, prompt_ids: jax.Array, params: Mapping[str, Any], prng_seed: jax.Array, *asked: Any, **named: Any
    ) -> jax.Array:
        """The pure function behind a call, for `jax.pmap`; of its arguments, steps, height and width are static."""
        scheduler, params = _split(params)
        told = {"num_inference_steps": 50, **dict(zip(self.takes[3:], asked)), **named}
        return _run(self.pipe.program, params, prng_seed, *self._inputs(scheduler, prompt_ids, **told))


class FlaxStableDiffusionXLPipeline(FlaxDiffusionPipeline):
    """Text to image with Stable Diffusion XL; ids are those of both text encoders."""

    pipeline_class, encoders = StableDiffusionXLPipeline, 2
    takes = ("prompt_ids", "params", "prng_seed", "num_inference_steps", "guidance_scale", "height", "width", "latents")
    takes += ("neg_prompt_ids", "return_dict", "jit")
    prepare_inputs = FlaxDiffusionPipeline.prepare_text_inputs


class FlaxStableDiffusionImg2ImgPipeline(FlaxDiffusionPipeline):
    """Image to image with Stable Diffusion 1 or 2."""

    pipeline_class = StableDiffusionImg2ImgPipeline
    takes = ("prompt_ids", "image", "params", "prng_seed", "strength", "num_inference_steps", "height", "width")
    takes += ("guidance_scale", "noise", "neg_prompt_ids", "return_dict", "jit")

    def prepare_inputs(self, prompt: str | Sequence[str], image: Any) -> tuple[np.ndarray, np.ndarray]:
        """Prompts as ids, and Pillow's pictures as arrays [B, 3, H, W] in [-1, 1]."""
        return self.prepare_text_inputs(prompt), np.moveaxis(pictures.to_array(image), -1, 1)

    def _told(self, image: jax.Array, height: int | None, width: int | None, noise: Any, **asked: Any) -> dict:
        arrays = {"given": {"image": (image, 3)}, "filled": {"image": last(image)}}
        return asked | arrays | {"latents": noise, "image": _blank(image, height, width)}


class FlaxStableDiffusionInpaintPipeline(FlaxDiffusionPipeline):
    """Paint over a part of a picture, with a U-Net of Stable Diffusion that was made for it (nine channels)."""

    pipeline_class = StableDiffusionInpaintPipeline
    takes = ("prompt_ids", "mask", "masked_image", "params", "prng_seed", "num_inference_steps", "height", "width")
    takes += ("guidance_scale", "latents", "neg_prompt_ids", "return_dict", "jit")

    def prepare_inputs(
        self, prompt: str | Sequence[str], image: Any, mask: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prompts as ids, the masked pictures [B, 3, H, W] in [-1, 1], and the masks [B, 1, H, W], 1 where to paint."""
        image = pictures.to_array(image)
        mask = pictures.to_mask(mask, *image.shape[1:3])
        return self.prepare_text_inputs(prompt), *(np.moveaxis(a, -1, 1) for a in (image * (mask < 0.5), mask))

    def _told(
        self, mask: jax.Array, masked_image: jax.Array, height: int | None, width: int | None, **asked: Any
    ) -> dict:
        check_channels(self.pipe, 1 + self.pipe.vae.config.latent_channels)
        factor, known = vae_factor(self.pipe), last(masked_image)
        small = last(mask)[..., ::factor, ::factor, :].astype(jnp.float32)
        arrays = {
            "given": {"mask": (mask, 1), "masked_image": (masked_image, 3)},
            "filled": {"image": known, "beside_image": known, "beside": small},
        }
        blank = {"image": _blank(masked_image, height, width), "mask_image": _blank(mask, height, width)}
        return asked | arrays | blank | dict(zip(("height", "width"), np.shape(mask)[-2:]))


class FlaxStableDiffusionControlNetPipeline(FlaxDiffusionPipeline):
    """Text to image led by pictures through a ControlNet, whose parameters go into `params`."""

    pipeline_class = StableDiffusionControlNetPipeline
    takes = ("prompt_ids", "image", "params", "prng_seed", "num_inference_steps", "guidance_scale", "latents")
    takes += ("neg_prompt_ids", "controlnet_conditioning_scale", "return_dict", "jit")

    def prepare_image_inputs(self, image: Any) -> np.ndarray:
        """Pillow's pictures as arrays [B, 3, H, W] in [0, 1]."""
        return np.moveaxis((pictures.to_array(image) + 1) / 2, -1, 1)

    def _told(self, image: jax.Array, **asked: Any) -> dict:
        arrays = {"given": {"image": (image, 3)}, "filled": {"controlnet_image": last(image)}}
        return asked | arrays | {"image": _blank(image)}


def _blank(given: jax.Array, height: int | None = None, width: int | None = None) -> np.ndarray:
    """One blank picture [1, H, W, C] for what is [..., C, H, W]. Raises ValueError if another size was asked for."""
    channels, *size = np.shape(given)[-3:]
    if [height or size[0], width or size[1]] != size:
        raise ValueError(
            f"The pictures are {size[0]} x {size[1]}, and height={height}, width={width}; leave those out."
        )
    return np.zeros((1, *size, channels), np.float32)


def _split(params: Mapping[str, Any]) -> tuple[schedulers.Scheduler, dict[str, Any]]:
    """The scheduler that the state names, and the networks' parameters."""
    state = params.get("scheduler")
    if not isinstance(state, FlaxSchedulerState):
        raise ValueError(
            f"params['scheduler'] is a {type(state).__name__}; put a state there, as in "
            "scheduler, params['scheduler'] = FlaxDDIMScheduler.from_pretrained(…, subfolder='scheduler')."
        )
    return state.scheduler, {name: value for name, value in params.items() if name != "scheduler"}


def _check_axes(prompt_ids: jax.Array, params: Mapping[str, Any], key: jax.Array, jit: bool, encoders: int = 1) -> None:
    """Raise ValueError unless there are ids, and with `jit` parameters and a key for each of their devices."""
    if np.ndim(prompt_ids) != 1 + encoders + jit:
        ids = "B, N" if encoders == 1 else f"B, {encoders}, N"
        expected = f"[devices, {ids}], as shard returns them, with jit=True" if jit else f"[{ids}], or jit=True"
        raise ValueError(f"prompt_ids have shape {np.shape(prompt_ids)}; expected {expected}.")
    n, typed = len(prompt_ids), jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if jit and (key.shape if typed else key.shape[:-1])[:1] != (n,):
        raise ValueError(f"prng_seed has shape {key.shape}; {n} devices need a key each: jax.random.split(key, {n}).")
    if jit and any(np.shape(leaf)[:1] != (n,) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"params lack the axis of {n} devices; give replicate(params).")
