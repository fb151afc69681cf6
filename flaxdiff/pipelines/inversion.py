"""Inversion: from a picture back to where a sampler would have made it from.

A sampler without noise is followed upwards, from the picture to the sample that leads to it: `invert`. For one that
draws noise the picture is put under noise as high as each step begins, and what is solved for is the noise that leads
from one to the next: `noise_maps`. A run that starts there and is handed that noise (`retrace`) makes the picture
again, until its prompts, its guidance or its masks say otherwise.
"""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.core import Params
from flaxdiff.pipelines import tasks
from flaxdiff.pipelines.generate import Program, Size
from flaxdiff.schedulers import DDIMInverseScheduler, Scheduler, tables

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline


@functools.partial(jax.jit, static_argnums=0)
def encoded(
    program: Program, params: Mapping[str, Params], key: jax.Array, images: jax.Array, spread: float = 1.0
) -> jax.Array:
    """Pictures [B, H, W, 3] in [-1, 1] -> latents [B, h, w, C], drawn with so much of the posterior's deviation."""
    keys = tables.image_keys(key, len(images))
    return program.family.encode_image(program.networks(params), images, keys, spread).astype(jnp.float32)


def latents_of(
    pipe: "DiffusionPipeline", params: Mapping[str, Params], key: jax.Array, image: Any, spread: float, **sides: Any
) -> tuple[jax.Array, Size]:
    """The latents of pictures, or latents as they are, and the size in pixels."""
    tasks.need(pipe, image)
    if tasks.is_latents(pipe, image):
        return image, Size(*(side * tasks.vae_factor(pipe) for side in image.shape[1:3]))
    pixels = pictures.to_array(image, **sides)
    size = Size(*pixels.shape[1:3])
    tasks.check_size(pipe, size)
    return encoded(pipe.program, params, key, pixels, spread), size


def invert(
    pipe: "DiffusionPipeline",
    params: Mapping[str, Params],
    key: jax.Array,
    *,
    image: Any,
    prompt: str | list[str] | None = None,
    scheduler: Scheduler | None = None,
    guidance_scale: float = 1.0,
    **options: Any,
) -> jax.Array:
    """The samples that lead to a picture, from the noisiest to the least noisy: [B, n, h, w, C] float32.

    x_{t+1} = alpha_{t+1} x_0(x_t) + sigma_{t+1} eps(x_t): DDIM upwards, or DPM-Solver. The first of them is what a run
    of the pipeline makes the picture of, given as its `latents`, the better the more steps there are.

    Args:
      pipe: a pipeline from text to image.
      params: component -> parameters.
      key: a PRNG key, for the draw of the picture's latent.
      image: Pillow pictures, arrays [B, H, W, 3] in [0, 1], or latents [B, h, w, C].
      prompt: what the picture shows; by default nothing.
      scheduler: `DDIMInverseScheduler`, by default with the options of the pipeline's, or
        `DPMSolverMultistepInverseScheduler`.
      guidance_scale: strength of the prompt; above 1 a run back does not end quite where it began.
      **options: as of the pipeline's call, e.g. `num_inference_steps`; `strength`: go up through so much of the
        schedule.

    Raises:
      ValueError: a pipeline that starts from something else, a scheduler that does not lead upwards, no picture.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.load()
    >>> image = np.ones((16, 16, 3))
    >>> pipe = pipe.replace(progress=False)
    >>> flaxdiff.invert(pipe, params, jax.random.key(0), image=image, num_inference_steps=2).shape
    (1, 2, 4, 4, 8)

    Reference: Song et al., Denoising Diffusion Implicit Models, 2020; Mokady et al., Null-text Inversion for Editing
    Real Images using Guided Diffusion Models, 2022.
    """
    name = type(pipe).__name__
    if pipe.task is not tasks.text_to_image:
        raise ValueError(f"{name} does not start from noise alone; give AutoPipelineForText2Image.from_pipe(pipe).")
    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler) if scheduler is None else scheduler
    if not scheduler.ascends:
        raise ValueError(
            f"{type(scheduler).__name__} does not lead from a picture to noise; give an inverse scheduler."
        )
    latents, size = latents_of(pipe, params, key, image, 1.0)
    passed: list[jax.Array] = []
    options |= {"prompt": prompt or "", "guidance_scale": guidance_scale, "latents": latents}
    options |= {"height": size.height, "width": size.width, "output_type": "latent"}
    keep = lambda pipe, i, t, told: passed.append(told["latents"])
    pipe.replace(scheduler=scheduler)(params, key, callback_on_step_end=keep, **options)
    return jnp.stack(passed[::-1], 1)


class Inversion(NamedTuple):
    """Where a run of a sampler with noise is to start to make a picture, and the noise that it is to be handed."""

    latents: jax.Array  # [B, h, w, C], the sample before the first evaluation
    noises: jax.Array  # [B, n, h, w, C]
    schedule: Mapping[str, Any]  # which steps: options of the scheduler's plan


def retrace(pipe: "DiffusionPipeline", inversion: Inversion | None = None) -> tasks.Prepared:
    """Start where an inversion ended, with its noise and over its steps.

    Args:
      inversion: from `noise_maps`.

    Raises:
      ValueError: none.
    """
    if inversion is None:
        raise ValueError(f"{type(pipe).__name__} changes a picture that was inverted; give inversion=pipe.invert(…).")
    size = Size(*(side * tasks.vae_factor(pipe) for side in inversion.latents.shape[1:3]))
    return size, {"noisy_latents": inversion.latents, "noises": inversion.noises}, dict(inversion.schedule)


def noise_maps(
    pipe: "DiffusionPipeline",
    params: Mapping[str, Params],
    key: jax.Array,
    *,
    latents: jax.Array,
    schedule: Mapping[str, Any],
    noise: jax.Array | None = None,
    **options: Any,
) -> Inversion:
    """The noise that a sampler would have to draw to make a picture.

    z_t = (x_{t-1} - mean of the step from x_t) / its deviation, where every x_t is the picture under noise of its own.

    Args:
      pipe: a pipeline that can `retrace`.
      params, key: as of its call; the key draws the noise.
      latents: of the pictures, [B, h, w, C].
      schedule: options of the scheduler's plan.
      noise: [B, n, h, w, C] of unit variance, in place of what the key gives.
      **options: of the call: `prompt`, `guidance_scale`, …

    Raises:
      ValueError: a scheduler whose steps draw no noise, or take several evaluations.

    Reference: Huberman-Spiegelglas et al., An Edit Friendly DDPM Noise Space: Inversion and Manipulations, 2023.
    """
    plan = pipe.solver.plan(**schedule)
    if pipe.solver.order > 1 or not plan.noisy.any():
        raise ValueError(
            f"{type(pipe.solver).__name__} draws no noise of its own at each step; use DDIMScheduler with eta=1, or "
            'DPMSolverMultistepScheduler with algorithm_type="sde-dpmsolver++".'
        )
    levels = tuple(np.asarray(level)[:, None, None, None] for level in (plan.alpha, plan.sigma))
    if noise is None:
        draw = lambda key: jax.random.normal(key, (len(plan.alpha), *latents.shape[1:]))
        noise = jax.vmap(draw)(tables.image_keys(key, len(latents)))
    under = levels[0] * latents[:, None] + levels[1] * noise
    wanted = jnp.concatenate([under[:, 1:], latents[:, None]], 1)
    found: list[jax.Array] = []

    def solve(pipe: Any, i: int, t: float, told: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """From the mean of the step to the sample that was wanted."""
        deviation = float(plan.mix[i, 0, -1])
        found.append((wanted[:, i] - told["latents"]) / deviation if deviation > 0 else jnp.zeros_like(latents))
        return {"latents": told["latents"] + deviation * found[-1]}  # of itself, so that errors do not add up

    still = Inversion(under[:, 0], jnp.zeros_like(under), schedule)
    pipe(params, key, inversion=still, callback_on_step_end=solve, output_type="latent", **options)
    return Inversion(under[:, 0], jnp.stack(found, 1), schedule)
