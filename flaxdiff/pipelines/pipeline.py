"""What every pipeline is: networks, a scheduler, tokenizers and a few settings; frozen, and without weights.

A pipeline class is a family of models times a task, named as diffusers names it. It turns what a user asks for into
arrays (`prepare_inputs`), and hands out the pure function that makes pictures of them (`generate`). Calling it does
both, step by step under a progress bar. Whatever diffusers would change in place (`enable_attention_slicing`, another
scheduler or autoencoder) returns a new pipeline here.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from flaxdiff import images as pictures
from flaxdiff import memory, registry
from flaxdiff.adapters import ip_adapter
from flaxdiff.core import Params, Spec
from flaxdiff.guidance import Guidance, standard
from flaxdiff.pipelines import ahead
from flaxdiff.pipelines.generate import Family, Program
from flaxdiff.pipelines.tasks import blank_inputs, text_to_image
from flaxdiff.schedulers import Scheduler

ROWS = 64  # length of the scheduler's tables: runs of up to so many evaluations share a compiled program

# given for each image, or for each prompt
STARTS = ("latents", "image", "image_latents", "noisy_latents", "mask", "beside", "beside_image")

_begin = jax.jit(Program.begin, static_argnums=0)
_step = jax.jit(Program.step, static_argnums=0)
_decode = jax.jit(Program.decode, static_argnums=0)


def _jitted(program: Program) -> ahead.Executables:
    """The parts of a run as functions that compile when they are called."""
    return ahead.Executables(*(functools.partial(part, program) for part in (_begin, _step, _decode)))


@functools.cache
def _interned(program: Program) -> Program:
    """One object for all equal programs: methods are equal, and so compiled once, only if they share their object."""
    return program


class PipelineOutput(NamedTuple):
    """What a call returns: pictures of Pillow, or an array when asked for."""

    images: Any


@dataclasses.dataclass(frozen=True)
class DiffusionPipeline:
    """The base of all pipelines; `DiffusionPipeline.from_pretrained` finds the class that a checkpoint names.

    Attributes:
      specs: (component, spec) of each network.
      scheduler: the sampler.
      tokenizers: (component, tokenizer); a tokenizer maps a list of texts to ids [B, N].
      settings: (key, value) of model_index.json beside the components.
      guidance: strengths -> the rule that joins the branches.
      progress: whether a call shows a progress bar.

    >>> import flaxdiff, jax
    >>> pipe, params = flaxdiff.load()
    >>> pipe(params, jax.random.key(0), prompt="red apple", num_inference_steps=2).images[0].size
    (64, 64)
    """

    specs: tuple[tuple[str, Spec], ...]
    scheduler: Scheduler
    tokenizers: tuple[tuple[str, Callable[[Sequence[str]], np.ndarray]], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    guidance: Callable[[Mapping[str, jax.Array]], Guidance] = standard
    progress: bool = True

    family: ClassVar[Family]
    task: ClassVar[Callable] = staticmethod(text_to_image)
    extras: ClassVar[tuple[Callable, ...]] = ()  # further (pipe, size, guided, …) -> arrays, beside the family's
    steers: ClassVar[Mapping[str, str]] = {}  # component -> class of those of which there may be one or a list
    finish: ClassVar[Callable] = staticmethod(
        lambda images, options: images
    )  # Pillow's pictures -> what a call returns
    reads: ClassVar[tuple[str, ...]] = ()  # components of a checkpoint that most pipelines pass over
    defaults: ClassVar[Mapping[str, Any]] = {"num_inference_steps": 50, "guidance_scale": 7.5}

    # --- loading, saving, changing -----------------------------------------------------------------------------------

    @classmethod
    def resolve(cls, named: str) -> type["DiffusionPipeline"]:
        """The class to use for a checkpoint that names one."""
        return cls if hasattr(cls, "family") else registry.find(named, "pipeline")

    @classmethod
    def from_pipe(cls, pipe: "DiffusionPipeline", **changes: Any) -> Self:
        """A pipeline of this class with the parts of another, whose parameters it shares.

        Args:
          pipe: any that has the networks which this class needs.
          **changes: parts to take instead, as of `replace`; specs of further networks too.

        >>> import flaxdiff
        >>> pipe, params = flaxdiff.load()
        >>> flaxdiff.StableDiffusionInpaintPipeline.from_pipe(pipe).specs == pipe.specs
        True
        """
        more = {k: v for k, v in changes.items() if isinstance(v, Spec) and k not in dict(pipe.specs)}
        fields = {f.name: getattr(pipe, f.name) for f in dataclasses.fields(pipe)}
        made = cls(**(fields | {"specs": (*pipe.specs, *more.items())}))
        return made.replace(**{k: v for k, v in changes.items() if k not in more})

    @classmethod
    def from_single_file(cls, source: str, **options: Any) -> tuple[Self, dict[str, Params]]:
        """Load a pipeline and its parameters from a file with the original names; see `single_file.load_pipeline`."""
        from flaxdiff.checkpoint import single_file

        return single_file.load_pipeline(cls, source, **options)

    @classmethod
    def from_pretrained(cls, repo: str, **options: Any) -> tuple[Self, dict[str, Params]]:
        """Load a pipeline and its parameters from a folder or a Hub repository; see `checkpoint.load_pipeline`."""
        from flaxdiff import checkpoint

        return checkpoint.load_pipeline(cls, repo, **options)

    def __getattr__(self, name: str) -> Any:
        for components in (self.specs, self.tokenizers, self.settings) if not name.startswith("_") else ():
            if name in dict(components):
                return dict(components)[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}.")

    def replace(self, **changes: Any) -> Self:
        """The same pipeline with some parts changed: a component by its name, or a field.

        >>> import flaxdiff
        >>> pipe, params = flaxdiff.load()
        >>> pipe.replace(scheduler=flaxdiff.EulerDiscreteScheduler.from_config(pipe.scheduler)).scheduler.order
        1
        """
        fields = {f.name for f in dataclasses.fields(self)}
        changed = {k: v for k, v in changes.items() if k in fields}
        for group in ("specs", "tokenizers", "settings"):
            ours = {k: changes[k] for k in dict(getattr(self, group)) if k in changes}
            if ours:
                changed[group] = tuple((dict(getattr(self, group)) | ours).items())
        known = fields | {k for group in ("specs", "tokenizers", "settings") for k in dict(getattr(self, group))}
        if unknown := sorted(set(changes) - known):
            raise TypeError(f"{type(self).__name__} has no part {unknown}; it has {', '.join(sorted(known))}.")
        return dataclasses.replace(self, **changed)

    def enable_attention_slicing(self) -> Self:
        """The same pipeline with attention computed in slices: less memory, some time."""
        return self.replace(**{name: spec.replace(attention="sliced") for name, spec in self.specs})

    def enable_vae_slicing(self) -> Self:
        """The same pipeline with pictures encoded and decoded one at a time: the memory of one, whatever the batch."""
        return self.replace(vae=self.vae.replace(slicing=True))

    def enable_vae_tiling(self, side: int | None = None) -> Self:
        """The same pipeline with large pictures encoded and decoded in tiles that overlap, see `nn/tiling.py`.

        Args:
          side: of a tile in pixels; by default, as in diffusers, what the autoencoder was trained on.

        >>> import flaxdiff
        >>> flaxdiff.load()[0].enable_vae_tiling().vae.config.tiling
        64
        """
        size = self.vae.config.sample_size
        return self.replace(vae=self.vae.replace(tiling=side or (size[0] if isinstance(size, tuple) else size)))

    # --- sampling ----------------------------------------------------------------------------------------------------

    @property
    def program(self) -> Program:
        """What gets compiled: independent of scheduler, tokenizers and everything that is a value."""
        return _interned(Program(self.family, self.specs, self.guidance))

    @property
    def generate(self) -> Callable[[Mapping[str, Params], jax.Array, Mapping[str, Any]], jax.Array]:
        """(params, key, inputs) -> pictures [B, H, W, C], float32 in [0, 1]: a pure function to jit, vmap, pmap, grad.

        It is the same function whatever the scheduler, so that swapping one compiles nothing.
        """
        return self.program.generate

    def prepare_inputs(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_rescale: float | Sequence[float] = 0.0,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> dict[str, Any]:
        """Turn what is asked for into arrays, on the host: the `inputs` of `generate`.

        Args:
          prompt: what to draw; one text or several.
          num_inference_steps: steps of the scheduler, by default as many as the checkpoint or its class asks for; or
          timesteps, sigmas: a schedule of one's own.
          guidance_scale: strength of the prompt, one number or one for each image; at most 1 asks the network once.
          guidance_rescale: see `guidance.rescale`.
          num_images_per_prompt: pictures of each prompt.
          **options: of the family (`negative_prompt`, `prompt_embeds`, …), of the task (`height`, `image`, …), and of
            the scheduler's plan (`eta`, `denoising_end`, …).

        Raises:
          ValueError: nothing to draw, a size that does not divide, and the like.
        """
        ahead.keep_compiled()
        defaults = {**self.defaults, **dict(dict(self.settings).get("defaults", ()))}
        scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        distilled = self.family.distilled(dict(self.specs), scale) if self.family.distilled else {}
        guided = bool(np.max(scale) > 1) and not distilled
        options["prompt"] = prompt
        takes = lambda function: {k: v for k, v in options.items() if k in inspect.signature(function).parameters}
        size, arrays, window = self.task(self, **takes(self.task))
        arrays |= distilled
        prepares = (self.family.prepare, ip_adapter.prepare, *self.extras)
        for prepare in prepares:
            arrays |= prepare(self, size, guided, **takes(prepare))
        taken = {k for function in (self.task, *prepares) for k in takes(function)}
        options = {k: v for k, v in options.items() if k not in taken}
        if options.pop("prompt", None) is not None:
            raise TypeError(f"{type(self).__name__} takes no prompt.")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: ask for at least one.")

        prompts = max((len(a) for k, a in arrays.items() if np.ndim(a) and k not in STARTS), default=1)
        if prompts == 1:  # one prompt for several pictures to start from
            prompts = max((len(a) for k, a in arrays.items() if k in STARTS), default=1)
        batch = prompts * num_images_per_prompt
        inputs = {k: _per_image(k, a, prompts, num_images_per_prompt) for k, a in arrays.items()}
        if timesteps is None and sigmas is None:
            asked = num_inference_steps is not None
            num_inference_steps = num_inference_steps if asked else defaults["num_inference_steps"]
        plan = self.scheduler.plan(num_inference_steps, timesteps=timesteps, sigmas=sigmas, **window, **options)
        rows = max(ROWS, 1 << (int(plan.steps) - 1).bit_length())
        inputs |= {"index": np.arange(batch, dtype=np.int32), "size": size, "plan": plan.pad(rows)}
        if guided:
            strengths = {"guidance_scale": scale, "guidance_rescale": guidance_rescale}
            strengths |= {k: inputs.pop(k) for k in ("image_guidance_scale",) if k in inputs}
            inputs["guidance"] = {k: np.asarray(v, np.float32) for k, v in strengths.items()}
        return inputs

    def compile(
        self,
        params: Mapping[str, Params],
        inputs: Mapping[str, Any] | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> ahead.Executables:
        """Compile ahead of time what a call runs, its parts side by side, or read it from a folder.

        Calls with arguments of these shapes use the programs from then on; they are values to nothing else, so another
        prompt, key, scheduler or number of steps needs no other.

        Args:
          params: component -> parameters, or their shapes as `abstract(spec, dtype)` gives them.
          inputs: from `prepare_inputs`; or in their place
          **options: batch, height, width, guidance_scale, …: as of `prepare_inputs`, prompts left out.
          folder: where programs are kept, made if it is not there. What it holds is used if it was made by these
            versions of jax and flaxdiff on such a device for such arguments, and replaced, with a warning, if it is
            damaged. It holds machine code: use folders that you trust.

        Returns:
          The programs; their `generate(params, key, inputs)` is a pure call that neither traces nor compiles.

        Raises:
          ValueError: a size that does not divide, or arguments that are split over several devices.

        >>> import flaxdiff, jax, tempfile
        >>> pipe, params = flaxdiff.load()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     programs = pipe.compile(params, folder=folder, height=16, width=16)
        >>> inputs = pipe.prepare_inputs(prompt="red apple", height=16, width=16, num_inference_steps=2)
        >>> programs.generate(params, jax.random.key(0), inputs).shape
        (1, 16, 16, 3)
        """
        inputs = blank_inputs(self, **options) if inputs is None else inputs
        key = jax.eval_shape(lambda: jax.random.key(0))
        return ahead.compiled(self.program, (params, key, inputs), folder)

    def __call__(
        self,
        params: Mapping[str, Params],
        key: jax.Array | Sequence[jax.Array],
        *,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Self, int, float, dict[str, jax.Array]], Mapping | None] | None = None,
        **options: Any,
    ) -> PipelineOutput:
        """Make pictures.

        Args:
          params: component -> parameters, on the device or on the host, see `memory.offload`.
          key: one PRNG key, or one for each image: a picture that pleases is made again, and refined, by its own key.
          output_type: "pil", "np" (float32 [B, H, W, C] in [0, 1]), or "latent" (not decoded).
          callback_on_step_end: called as (pipe, step, timestep, {"latents": …}) after each step; latents that it
            returns in a dictionary replace those of the run.
          **options: see `prepare_inputs`.

        Returns:
          The pictures, as `.images`.
        """
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type={output_type!r} is not known; use 'pil', 'np' or 'latent'.")
        inputs, program = self.prepare_inputs(**options), self.program
        key = jnp.stack(list(key)) if isinstance(key, Sequence) else key
        run = ahead.find(program, params, key, inputs) or _jitted(program)
        conditions, state = run.begin(params, key, inputs)
        timesteps = np.asarray(inputs["plan"].timesteps)
        looped = memory.fetched(params, self.family.loop)
        with tqdm(total=int(inputs["plan"].steps), disable=not self.progress) as bar:
            for i in range(bar.total):
                before, state = state, run.step(looped, conditions, state)
                if callback_on_step_end is not None:
                    told = callback_on_step_end(self, i, float(timesteps[i]), {"latents": state.sampler.sample})
                    if told and "latents" in told:
                        slots = state.sampler.slots.at[0].set(told["latents"])
                        state = state._replace(sampler=state.sampler._replace(slots=slots))
                jax.block_until_ready(before)  # one step behind, so that the bar is true and the device never waits
                bar.update()
        del looped  # what came from the host makes room for the decoder
        if output_type == "latent":
            return PipelineOutput(state.sampler.sample)
        images = np.asarray(run.decode(params, state.sampler.sample))
        if output_type == "np":
            return PipelineOutput(images)
        return PipelineOutput(self.finish(pictures.to_pil(images), options))


def _per_image(name: str, array: Any, prompts: int, copies: int) -> np.ndarray | jax.Array:
    """Values for each prompt as values for each image; what is the same for all is broadcast, a number stays one."""
    if np.ndim(array) == 0:
        return np.asarray(array)
    if len(array) == prompts * copies and name in STARTS:
        return array
    if len(array) not in (1, prompts):
        raise ValueError(f"{name} has {len(array)} entries for {prompts} prompts; give one, or one for each.")
    return np.repeat(array, prompts * copies // len(array), axis=0)
