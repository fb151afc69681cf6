"""What every pipeline is: networks, a scheduler, tokenizers and a few settings; frozen, and without weights.

A pipeline class is a family of models times a task, named as diffusers names it. It turns what a user asks for into
arrays (`prepare_inputs`), and hands out the pure function that makes pictures of them (`generate`). Calling it does
both, step by step under a progress bar. Whatever diffusers would change in place (`enable_attention_slicing`, another
scheduler or autoencoder) returns a new pipeline here.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np

from flaxdiff import registry
from flaxdiff.caching import Cache
from flaxdiff.core import Params, Spec, frozen
from flaxdiff.guidance import Guidance, standard
from flaxdiff.pipelines import ahead, calling, inputs, mixins
from flaxdiff.pipelines.generate import Earlier, Family, Program, autoencoder, denoiser
from flaxdiff.pipelines.tasks import blank_inputs, text_to_image
from flaxdiff.schedulers import Scheduler


@functools.cache
def _interned(program: Program) -> Program:
    """One object for all equal programs: methods are equal, and so compiled once, only if they share their object."""
    return program


class Before(NamedTuple):
    """A pipeline whose loop is run before another's own.

    Attributes:
      name: what its options begin with in a call of the other, as in `prior_num_inference_steps`.
      gives: the name of its result among the other's inputs.
      pipeline: its class.
      components: its name for a component -> the other's; its `scheduler` is among them.
    """

    name: str
    gives: str
    pipeline: type["DiffusionPipeline"]
    components: tuple[tuple[str, str], ...]

    def of(self, pipe: "DiffusionPipeline") -> "DiffusionPipeline":
        """The pipeline itself, of another's components."""
        taken = lambda group: tuple((own, dict(group)[name]) for own, name in self.components if name in dict(group))
        settings, prefix = dict(taken(pipe.settings)), f"{self.name}_"
        made = self.pipeline(taken(pipe.specs), settings.pop("scheduler"), taken(pipe.tokenizers))
        defaults = dict(dict(pipe.settings).get("defaults", ()))
        return made.by_default(**{k.removeprefix(prefix): v for k, v in defaults.items() if k.startswith(prefix)})

    def program(self, pipe: "DiffusionPipeline") -> Earlier:
        """What is run of it before the other."""
        program = dataclasses.replace(self.of(pipe).program, final=False)
        components = tuple((own, name) for own, name in self.components if name in dict(pipe.specs))
        return Earlier(self.name, self.gives, components, _interned(program))


@dataclasses.dataclass(frozen=True)
class DiffusionPipeline(
    mixins.StableDiffusionMixin,
    mixins.StableDiffusionXLLoraLoaderMixin,
    mixins.UNet2DConditionLoadersMixin,
    mixins.TextualInversionLoaderMixin,
    mixins.IPAdapterMixin,
    mixins.FromSingleFileMixin,
    mixins.PushToHubMixin,
):
    """The base of all pipelines; `DiffusionPipeline.from_pretrained` finds the class that a checkpoint names.

    Attributes:
      specs: (component, spec) of each network.
      scheduler: the sampler.
      tokenizers: (component, tokenizer); a tokenizer maps a list of texts to ids [B, N].
      settings: (key, value) of model_index.json beside the components.
      guidance: strengths by name, which a call takes as options -> the rule that joins the branches; None for what the
        class `guides` by.
      cache: strengths by name -> how to use again what the network said at other steps, see caching.py; None for not.
      watermark: what a call does to pictures [B, H, W, C] in [0, 1] after they are decoded, see afterwards.py.
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
    guidance: Callable[..., Guidance] | None = None
    cache: Callable[..., Cache] | None = None
    watermark: Callable[[np.ndarray], np.ndarray] | None = None
    progress: bool = True

    family: ClassVar[Family]
    task: ClassVar[Callable] = staticmethod(text_to_image)
    guides: ClassVar[Callable[..., Guidance]] = staticmethod(standard)
    asks: ClassVar[str] = "guidance_scale"  # the strength that, beyond 1, asks for the negative branch
    extras: ClassVar[tuple[Callable, ...]] = ()  # further (pipe, size, guided, …) -> arrays, beside the family's
    steers: ClassVar[Mapping[str, str]] = {}  # component -> class of those of which there may be one or a list
    controls: ClassVar[bool] = False  # whether the latent of `control_image` lies beside the sample
    # Pillow's pictures and the call's options -> the pictures that a call returns
    finish: ClassVar[Callable] = staticmethod(lambda images, options: images)
    # (self, images, flags, output_type, options) -> what a call returns
    present: ClassVar[Callable] = calling.presented
    reads: ClassVar[tuple[str, ...]] = ()  # components of a checkpoint that most pipelines pass over
    processor: ClassVar[str] = "feature_extractor"  # the component that says how to make what CLIP sees of a picture
    formerly: ClassVar[Mapping[str, str]] = {}  # class that older checkpoints name -> the one that is meant
    before: ClassVar[tuple[Before, ...]] = ()  # whose loops are run first
    sampler: ClassVar[str | None] = "scheduler"  # the component that the scheduler is in a checkpoint, if there is one
    defaults: ClassVar[Mapping[str, Any]] = {"num_inference_steps": 50, "guidance_scale": 7.5}

    # --- loading, saving, changing -----------------------------------------------------------------------------------

    @classmethod
    def resolve(cls, named: str, given: Mapping[str, Any] = MappingProxyType({})) -> type["DiffusionPipeline"]:
        """The class to use for a checkpoint that names one, and components that are given beside it."""
        return cls if hasattr(cls, "family") else registry.find(named, "pipeline")

    @classmethod
    def separate(cls, specs: Mapping[str, Spec], params: Mapping[str, Params]) -> tuple[Mapping, Mapping]:
        """Specs and parameters by component, as this class holds them, from how a folder does."""
        return specs, params

    @classmethod
    def from_pipe(cls, pipe: "DiffusionPipeline", **changes: Any) -> Self:
        """A pipeline of this class with the parts of another, whose parameters it shares.

        Args:
          pipe: any that has the networks which this class needs.
          **changes: parts to take instead, as of `replace`; specs of further networks, and None for one to leave out.

        >>> import flaxdiff
        >>> pipe, params = flaxdiff.load()
        >>> flaxdiff.StableDiffusionInpaintPipeline.from_pipe(pipe).specs == pipe.specs
        True
        """
        without = [k for k, v in changes.items() if v is None]
        kept = tuple(part for part in pipe.specs if part[0] not in without)
        more = {k: v for k, v in changes.items() if isinstance(v, Spec) and k not in dict(kept)}
        fields = {f.name: getattr(pipe, f.name) for f in dataclasses.fields(pipe)}
        made = cls(**(fields | {"specs": (*kept, *more.items())}))
        return made.replace(**{k: v for k, v in changes.items() if k not in (*more, *without)})

    @classmethod
    def from_pretrained(cls, repo: str, **options: Any) -> tuple[Self, dict[str, Params]]:
        """Load a pipeline and its parameters from a folder or a Hub repository; see `checkpoint.load_pipeline`."""
        from flaxdiff import checkpoint

        return checkpoint.load_pipeline(cls, repo, **options)

    def __getattr__(self, name: str) -> Any:
        if name == self.sampler:
            return self.scheduler
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
        changes = {"scheduler" if k == self.sampler else k: v for k, v in changes.items()}
        changed = {k: v for k, v in changes.items() if k in fields}
        for group in ("specs", "tokenizers", "settings"):
            ours = {k: changes[k] for k in dict(getattr(self, group)) if k in changes}
            if ours:
                changed[group] = tuple((dict(getattr(self, group)) | ours).items())
        known = fields | {k for group in ("specs", "tokenizers", "settings") for k in dict(getattr(self, group))}
        if unknown := sorted(set(changes) - known):
            raise TypeError(f"{type(self).__name__} has no part {unknown}; it has {', '.join(sorted(known))}.")
        return dataclasses.replace(self, **changed)

    def by_default(self, **options: Any) -> Self:
        """The same pipeline, whose calls have these options unless they say otherwise.

        They are strengths of the guidance, the number of steps, and what the task and the family take.

        >>> import flaxdiff
        >>> pipe, params = flaxdiff.load()
        >>> float(pipe.by_default(guidance_scale=3.0).prepare_inputs(prompt="cat")["guidance"]["guidance_scale"])
        3.0
        """
        if not options:
            return self
        settings = dict(self.settings)
        settings["defaults"] = frozen({**dict(settings.get("defaults", ())), **options})
        return dataclasses.replace(self, settings=tuple(settings.items()))

    # --- sampling ----------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Spec:
        """The network that the loop asks."""
        return dict(self.specs)[denoiser(self.specs)]

    @property
    def solver(self) -> Scheduler:
        """The scheduler as runs use it."""
        return self.scheduler

    @property
    def autoencoder(self) -> Spec | None:
        """The network between pictures and latents, if there is one."""
        return dict(self.specs).get(autoencoder(dict(self.specs)))

    @property
    def rule(self) -> Callable[..., Guidance]:
        """What the pipeline guides by, as a function of strengths."""
        return self.guidance or self.guides

    @property
    def program(self) -> Program:
        """What gets compiled: independent of scheduler, tokenizers and everything that is a value."""
        before = tuple(loop.program(self) for loop in self.before)
        return _interned(Program(self.family, self.specs, self.rule, self.cache, before))

    @property
    def generate(self) -> Callable[[Mapping[str, Params], jax.Array, Mapping[str, Any]], jax.Array]:
        """(params, key, inputs) -> pictures [B, H, W, C], float32 in [0, 1]: a pure function to jit, vmap, pmap, grad.

        It is the same function whatever the scheduler, so that swapping one compiles nothing.
        """
        return self.program.generate

    prepare_inputs = inputs.prepare_inputs
    __call__ = calling.call

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
