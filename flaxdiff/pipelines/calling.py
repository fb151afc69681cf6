"""A call of a pipeline: the parts of a run one after the other from the host, under a progress bar."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from flaxdiff import images as pictures
from flaxdiff import memory, parallel
from flaxdiff.core import Params
from flaxdiff.pipelines import afterwards, ahead
from flaxdiff.pipelines.generate import Program, for_decoder

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

_begin = jax.jit(Program.begin, static_argnums=0)
_step = jax.jit(Program.step, static_argnums=0)
_decode = jax.jit(Program.decode, static_argnums=0)


def _jitted(program: Program) -> ahead.Executables:
    """The parts of a run as functions that compile when they are called."""
    return ahead.Executables(*(functools.partial(part, program) for part in (_begin, _step, _decode)))


class PipelineOutput(NamedTuple):
    """What a call returns: pictures of Pillow, or an array when asked for; which of them a checker flagged, if any."""

    images: Any
    nsfw_content_detected: list[bool] | None = None


BaseOutput = ImagePipelineOutput = StableDiffusionPipelineOutput = StableDiffusionXLPipelineOutput = PipelineOutput
FluxPipelineOutput = PipelineOutput


def presented(
    pipe: "DiffusionPipeline", images: np.ndarray, flags: list[bool] | None, output_type: str, options: Mapping
) -> PipelineOutput:
    """Pictures [B, H, W, C] in [0, 1] as they are asked for."""
    return PipelineOutput(images if output_type == "np" else pipe.finish(pictures.to_pil(images), options), flags)


def call(
    pipe: "DiffusionPipeline",
    params: Mapping[str, Params],
    key: jax.Array | Sequence[jax.Array],
    *,
    output_type: str = "pil",
    callback_on_step_end: Callable[["DiffusionPipeline", int, float, dict[str, jax.Array]], Mapping | None]
    | None = None,
    **options: Any,
) -> PipelineOutput:
    """Make pictures.

    Args:
      params: component -> parameters, on the device or on the host, see `memory.offload`.
      key: one PRNG key, or one for each image: a picture that pleases is made again, and refined, by its own key.
      output_type: "pil", "np" (float32 [B, H, W, C] in [0, 1]), or "latent" (not decoded).
      callback_on_step_end: called as (pipe, step, timestep, {"latents": …}) after each step, where there are several
        loops of the last; latents that it returns in a dictionary replace those of the run, and so do strengths of the
        guidance from then on.
      **options: see `prepare_inputs`.

    Returns:
      The pictures, as `.images`. Where the pipeline has a `safety_checker`, those that it flags are black, and
      `.nsfw_content_detected` says which they are.

    Raises:
      ValueError: an unknown `output_type`, or no parameters of the checker.
    """
    if output_type not in ("pil", "np", "latent"):
        raise ValueError(f"output_type={output_type!r} is not known; use 'pil', 'np' or 'latent'.")
    afterwards.need_checker(pipe, params)
    inputs, program = pipe.prepare_inputs(**options), pipe.program
    key = jnp.stack(list(key)) if isinstance(key, Sequence) else key

    def run(program, params, key, inputs, tell=None, decoded=True):
        """A loop; `tell` is called after each step."""
        parts = ahead.find(program, params, key, inputs) or _jitted(program)
        conditions, state = parts.begin(params, key, inputs)
        timesteps = np.asarray(inputs["plan"].timesteps)
        looped = memory.fetched(params, program.family.loop)
        with tqdm(total=int(inputs["plan"].steps), disable=not pipe.progress) as bar:
            for i in range(bar.total):
                before, state = state, parts.step(looped, conditions, state)
                if tell is not None:
                    told = tell(pipe, i, float(timesteps[i]), {"latents": state.sampler.sample}) or {}
                    if "latents" in told:
                        state = state._replace(sampler=state.sampler.moved(told["latents"]))
                    weights = {k: jnp.asarray(told[k], jnp.float32) for k in conditions.strengths if k in told}
                    conditions = conditions._replace(strengths={**conditions.strengths, **weights})
                jax.block_until_ready(before)  # one step behind, so that the bar is true and the device never waits
                bar.update()
        del looped  # what came from the host makes room for the decoder
        return parts.decode(params, state.sampler.sample, for_decoder(inputs)) if decoded else state.sampler.sample

    with parallel.among(params):
        inputs = program.prepared(run, params, program.keys(key, inputs["index"]), inputs)
        images = run(program, params, key, inputs, callback_on_step_end, output_type != "latent")
    if output_type == "latent":
        return PipelineOutput(images)
    images = jax.device_get(parallel.collected(images))
    images, flags = afterwards.checked(pipe, params, images)
    images = images if pipe.watermark is None else pipe.watermark(images)
    return pipe.present(images, flags, output_type, options)
