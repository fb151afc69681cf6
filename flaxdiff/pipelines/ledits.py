"""LEDITS++: a picture is changed towards further prompts, or away from them, from the noise that leads to it.

Where they are attended to and where they matter is for `guidance.ledits` to find; the noise, for `inversion.py`.

Reference: Brack et al., LEDITS++: Limitless Image Editing using Text-to-Image Models, 2024.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.core import Params
from flaxdiff.guidance import edited, standard
from flaxdiff.pipelines import calling, inversion, tasks
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines import stable_diffusion_xl as xl
from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.text import further, texts, words
from flaxdiff.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, Scheduler


class LEditsPPInversionPipelineOutput(NamedTuple):
    """A picture that was inverted: as the networks saw it, what the autoencoder makes of it, and where it came from."""

    images: Any
    vae_reconstruction_images: Any
    inversion: inversion.Inversion


LEditsPPDiffusionPipelineOutput = calling.PipelineOutput


def edits(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    editing_prompt: str | Sequence[str] | None = None,
    user_mask: Any = None,
) -> dict[str, np.ndarray]:
    """Further prompts to go towards or away from.

    Args:
      editing_prompt: one text or several, for all pictures alike.
      user_mask: [h, w], or [B, h, w], at the size of the latents: 1 where to change the picture, 0 where not to.

    Raises:
      ValueError: a mask of another shape.
    """
    if editing_prompt is None:
        return {}
    ids = pipe.tokenizers[0][1](texts(editing_prompt))
    places = np.arange(ids.shape[1])
    named = np.stack([(places >= 1) & (places <= words(row)) for row in ids])
    arrays = {"editing_tokens": np.float32(named[None])}
    if user_mask is not None:
        h, w, _ = pipe.family.latent_shape(dict(pipe.specs), size)
        if np.shape(user_mask)[-2:] != (h, w):
            raise ValueError(f"user_mask has shape {np.shape(user_mask)}; expected [{h}, {w}], as the latents.")
        arrays["editing_mask"] = np.asarray(user_mask, np.float32).reshape(-1, h, w, 1)
    return arrays | further(pipe, "editing", editing_prompt)


class LEditsPP(DiffusionPipeline):
    """What both have: an inversion, and a scheduler that has noise to find."""

    guides = staticmethod(edited)
    task = staticmethod(inversion.retrace)
    extras = (edits,)
    defaults = {"num_inference_steps": 30, "guidance_scale": 1.0}
    still = 0  # last steps that are handed no noise

    @property
    def solver(self) -> Scheduler:
        """The scheduler with leading times; DPM-Solver's in place of one that is neither that nor DDIM's."""
        kind, options = type(self.scheduler), {}
        if not issubclass(kind, (DDIMScheduler, DPMSolverMultistepScheduler)):
            kind, options = DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
        return kind.from_config(self.scheduler, timestep_spacing="leading", **options)

    def invert(
        self,
        params: Mapping[str, Params],
        key: jax.Array,
        *,
        image: Any,
        source_prompt: str = "",
        source_guidance_scale: float = 3.5,
        num_inversion_steps: int = 30,
        skip: float = 0.15,
        height: int | None = None,
        width: int | None = None,
        noise: jax.Array | None = None,
        **options: Any,
    ) -> LEditsPPInversionPipelineOutput:
        """The noise that leads to a picture, for a call's `inversion=`.

        Args:
          params, key: as of a call.
          image: Pillow pictures, arrays [B, H, W, 3] in [0, 1], or latents.
          source_prompt, source_guidance_scale: what the picture shows, by default nothing, and how much that guides.
          num_inversion_steps: evaluations, here and in the call.
          skip: the share of the schedule, in addition, that is left out, where there is most noise.
          height, width: in pixels, by default the picture's.
          noise: as of `inversion.noise_maps`.
          **options: further ones of the prompts; a `prompt` in place of the source's does not guide, and is what a call
            with the same starts from.

        Raises:
          ValueError: a size that does not divide, a scheduler without noise.
        """
        total = int(num_inversion_steps * (1 + skip))
        share = min((num_inversion_steps + 0.5) / total, 1.0)  # of which the schedule takes the whole steps
        schedule = {"num_inference_steps": total, "strength": share}
        if isinstance(self.solver, DDIMScheduler):
            schedule["eta"] = 1.0
        latents, size = inversion.latents_of(self, params, key, image, 0.0, height=height, width=width)
        seen = np.asarray(calling._decode(self.program, params, latents))
        if source_prompt:
            options |= {"prompt": source_prompt, "guidance_scale": source_guidance_scale}
        found = inversion.noise_maps(
            self.replace(guidance=standard), params, key, latents=latents, schedule=schedule, noise=noise, **options
        )
        if self.still:
            found = found._replace(noises=found.noises.at[:, -self.still :].set(0))
        images = image if tasks.is_latents(self, image) else pictures.to_pil(_pixels(image, size))
        return LEditsPPInversionPipelineOutput(images, pictures.to_pil(seen), found)


def _pixels(image: Any, size: Size) -> np.ndarray:
    """A picture as the networks saw it, in [0, 1]."""
    return np.asarray(pictures.to_array(image, size.height, size.width)) / 2 + 0.5


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """What the edits start from, as tokens.

    Args:
      prompt: what the picture shows; by default
      negative_prompt: what it is not to, which the edits lead away from.
    """
    base = (negative_prompt or "") if prompt is None else prompt
    return sd.prepare(pipe, size, guided, base, negative_prompt)


class LEditsPPPipelineStableDiffusion(LEditsPP):
    """Change a picture towards or away from further prompts, with Stable Diffusion 1 or 2.

    >>> import flaxdiff, jax, numpy as np
    >>> pipe, params = flaxdiff.LEditsPPPipelineStableDiffusion.from_pretrained(flaxdiff.EMOJI)
    >>> pipe, key = pipe.replace(progress=False), jax.random.key(0)
    >>> found = pipe.invert(params, key, image=np.full((16, 16, 3), 0.5), num_inversion_steps=4).inversion
    >>> pipe(params, key, inversion=found, editing_prompt=["red", "dog face"]).images[0].size
    (16, 16)
    """

    family = sd.STABLE_DIFFUSION._replace(prepare=prepare)


def prepare_xl(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    negative_prompt_2: str | Sequence[str] | None = None,
    crops_coords_top_left: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """As `prepare`, of both encoders.

    Args:
      prompt, negative_prompt, negative_prompt_2, crops_coords_top_left: as of `xl.prepare`.
    """
    base = (negative_prompt or "", negative_prompt_2) if prompt is None else (prompt, None)
    negative = (negative_prompt, negative_prompt_2)
    arrays = xl.prepare(pipe, size, guided, *base, *negative, crops_coords_top_left=crops_coords_top_left)
    keep = arrays["negative_keep"] if prompt is None else np.float32(1)
    return arrays | {"keep": keep}


class LEditsPPPipelineStableDiffusionXL(LEditsPP):
    """Change a picture towards or away from further prompts, with Stable Diffusion XL."""

    family = xl.STABLE_DIFFUSION_XL._replace(prepare=prepare_xl)
    defaults = {**LEditsPP.defaults, "use_intersect_mask": False, "attention_alone_above": float("inf")}
    still = 3
