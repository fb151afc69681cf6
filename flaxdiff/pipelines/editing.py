"""Pipelines that change a picture by what is said of it: without a mask, which they find themselves.

DiffEdit asks what two prompts disagree about, and paints that. LEDITS++ goes towards further prompts, or away from
them, where they are attended to and where they matter. Both start from the picture's own noise, see `inversion.py`.

Reference: Couairon et al., DiffEdit: Diffusion-based Semantic Image Editing with Mask Guidance, 2022; Brack et al.,
LEDITS++: Limitless Image Editing using Text-to-Image Models, 2024.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.core import Params
from flaxdiff.guidance import edited, standard
from flaxdiff.pipelines import calling, inversion, tasks
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines import stable_diffusion_xl as xl
from flaxdiff.pipelines.generate import Inputs, Program, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.text import further, texts, words
from flaxdiff.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, Scheduler

# --- DiffEdit --------------------------------------------------------------------------------------------------------


def repaint(
    pipe: DiffusionPipeline,
    mask_image: Any = None,
    image_latents: jax.Array | None = None,
    inpaint_strength: float | None = None,
) -> tasks.Prepared:
    """Paint over a part of a picture along the path of its inversion.

    Args:
      mask_image: [B, h, w] at the size of the latents, or pictures: what is at least half white is painted over.
      image_latents: the path [B, n, h, w, C], as `invert` returns it.
      inpaint_strength: how much of the schedule the path goes through.

    Raises:
      ValueError: no mask, no path, or shapes that do not fit.
    """
    name = type(pipe).__name__
    if mask_image is None or image_latents is None:
        absent = "mask_image=, of generate_mask" if mask_image is None else "image_latents=, of invert"
        raise ValueError(f"{name} needs a mask and the path of an inversion; give {absent}.")
    path = jnp.asarray(image_latents, jnp.float32)
    if path.ndim != 5:
        raise ValueError(f"image_latents have shape {path.shape}; expected [B, n, h, w, C], as invert returns them.")
    mask = pictures.to_mask(mask_image)
    if mask.shape[1:3] != path.shape[2:4]:
        raise ValueError(f"mask_image is {mask.shape[1:3]}, and the latents {path.shape[2:4]}; they must agree.")
    size = Size(*(side * tasks.vae_factor(pipe) for side in path.shape[2:4]))
    return size, {"mask": mask, "path": path}, {"strength": inpaint_strength or pipe.defaults["inpaint_strength"]}


@functools.partial(jax.jit, static_argnums=0)
def _first(program: Program, params: Mapping[str, Params], key: jax.Array, inputs: Inputs) -> jax.Array:
    """What the network says at the first evaluation, as the guidance joins it."""
    return program.guess(params, *program.begin(params, key, inputs))[0]


class StableDiffusionDiffEditPipeline(DiffusionPipeline):
    """Change what a prompt names, with Stable Diffusion 1 or 2: find where it is, invert the picture, paint there.

    >>> import flaxdiff, jax, numpy as np
    >>> pipe, params = flaxdiff.StableDiffusionDiffEditPipeline.from_pretrained(flaxdiff.EMOJI)
    >>> pipe, key, image = pipe.replace(progress=False), jax.random.key(0), np.full((16, 16, 3), 0.5)
    >>> prompts = dict(source_prompt="red apple", target_prompt="blue book")
    >>> mask = pipe.generate_mask(params, key, image=image, num_maps_per_mask=2, **prompts)
    >>> path = pipe.invert(params, key, image=image, prompt="red apple", num_inference_steps=5)
    >>> options = dict(mask_image=mask, image_latents=path, num_inference_steps=5)
    >>> pipe(params, key, prompt="blue book", **options).images[0].size
    (16, 16)
    """

    family = sd.STABLE_DIFFUSION
    task = staticmethod(repaint)
    defaults = {**DiffusionPipeline.defaults, "inpaint_strength": 0.8}

    def generate_mask(
        self,
        params: Mapping[str, Params],
        key: jax.Array,
        *,
        image: Any,
        num_maps_per_mask: int = 10,
        mask_encode_strength: float = 0.5,
        mask_thresholding_ratio: float = 3.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        latents: jax.Array | None = None,
        **prompts: Any,
    ) -> np.ndarray:
        """Where two prompts disagree about a picture: [B, h, w] of 0 and 1, at the size of the latents.

        The mean over some noises of |eps(target) - eps(source)|, at least half of `mask_thresholding_ratio` times its
        own mean over the picture.

        Args:
          params, key: as of a call.
          image: Pillow pictures, arrays [B, H, W, 3] in [0, 1], or latents.
          num_maps_per_mask: noises to look under.
          mask_encode_strength: how much noise, as `strength` of image to image.
          mask_thresholding_ratio: the higher, the smaller the mask.
          num_inference_steps: of the schedule that the noise is one of.
          guidance_scale: of both prompts.
          latents: the noise of each map, of unit variance, in place of what the key gives.
          **prompts: `source_prompt`, what is there, and `target_prompt`, what is to be; their `…_negative_prompt`,
            `…_prompt_embeds` and `…_negative_prompt_embeds`.

        Raises:
          ValueError: no target, a ratio that is not positive.
          TypeError: an option of another name.
        """
        if mask_thresholding_ratio <= 0:
            raise ValueError(f"mask_thresholding_ratio={mask_thresholding_ratio} must be positive.")
        said: dict[str, dict[str, Any]] = {"source": {}, "target": {}}
        for name, value in prompts.items():
            of, _, kind = name.partition("_")
            if of not in said or kind not in (f"{a}prompt{b}" for a in ("", "negative_") for b in ("", "_embeds")):
                raise TypeError(f"generate_mask takes no {name!r}; it takes prompts of source_ and of target_.")
            said[of][kind] = value
        for of in said:
            if said[of].get("prompt") is None and said[of].get("prompt_embeds") is None:
                raise ValueError(f"generate_mask compares two prompts; give {of}_prompt= as well.")
        looking = sd.StableDiffusionImg2ImgPipeline.from_pipe(self)
        options = {"image": image, "strength": mask_encode_strength, "num_images_per_prompt": num_maps_per_mask}
        options |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "latents": latents}
        guesses = {
            of: _first(looking.program, params, key, looking.prepare_inputs(**options, **given))
            for of, given in said.items()
        }
        apart = np.abs(np.asarray(guesses["target"] - guesses["source"]))
        apart = apart.reshape(-1, num_maps_per_mask, *apart.shape[1:]).mean((1, 4))
        return np.float32(apart > mask_thresholding_ratio / 2 * apart.mean((1, 2), keepdims=True))

    def invert(
        self,
        params: Mapping[str, Params],
        key: jax.Array,
        *,
        image: Any,
        inpaint_strength: float = 0.8,
        guidance_scale: float = 7.5,
        inverse_scheduler: Scheduler | None = None,
        **options: Any,
    ) -> jax.Array:
        """The path [B, n, h, w, C] from a picture to its noise; `inversion.invert` of `inpaint_strength`."""
        plain = sd.StableDiffusionPipeline.from_pipe(self)
        options |= {"strength": inpaint_strength, "guidance_scale": guidance_scale, "scheduler": inverse_scheduler}
        return inversion.invert(plain, params, key, image=image, **options)


# --- LEDITS++ --------------------------------------------------------------------------------------------------------


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
        schedule = {"num_inference_steps": total, "strength": min((num_inversion_steps + 0.5) / total, 1.0)}
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
