"""What is asked for, as arrays: from prompts, pictures and settings to the `inputs` of `generate.py`, on the host."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.adapters import ip_adapter
from flaxdiff.guidance.rules import strengths
from flaxdiff.pipelines import ahead, beside
from flaxdiff.pipelines.generate import Size

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

ROWS = 64  # length of the scheduler's tables: runs of up to so many evaluations share a compiled program

# given for each image, or for each prompt
STARTS = ("latents", "image", "image_latents", "noisy_latents", "mask", "beside", "beside_image", "behind")
STARTS += ("decoder_image", "decoder_mask", "depth", "depth_pixels", "path", "noises", "reference")
STARTS += ("vae_latents", "clip_latents", "prompt_latents", "timestep_cond")


def prepare_inputs(
    pipe: "DiffusionPipeline",
    prompt: str | Sequence[str] | None = None,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    num_images_per_prompt: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Turn what is asked for into arrays, on the host: the `inputs` of `generate`.

    Args:
      prompt: what to draw; one text or several.
      num_inference_steps: steps of the scheduler, by default as many as the checkpoint or its class asks for; or
      timesteps, sigmas: a schedule of one's own.
      guidance_scale: strength of the prompt, one number or one for each image; at most 1 asks the network once.
      num_images_per_prompt: pictures of each prompt.
      **options: of the guidance (`guidance_rescale`, …), of the family (`negative_prompt`, `prompt_embeds`, …), of the
        task (`height`, `image`, …), and of the scheduler's plan (`eta`, `denoising_end`, …).

    Raises:
      ValueError: nothing to draw, a size that does not divide, and the like.
    """
    ahead.keep_compiled()
    own = dict(dict(pipe.settings).get("defaults", ()))  # the checkpoint's
    defaults = {**pipe.defaults, **own}
    scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    distilled = pipe.family.distilled(dict(pipe.specs), scale) if pipe.family.distilled else {}
    options |= {"prompt": prompt, "guidance_scale": scale}
    guided = bool(np.max({**defaults, **options}[pipe.asks]) > 1) and not distilled
    earlier, heard = before(pipe, {**options, "num_images_per_prompt": num_images_per_prompt})
    takes = lambda function, given={**own, **options}: {
        k: v for k, v in given.items() if k in inspect.signature(function).parameters
    }
    steered = takes(pipe.rule, {**defaults, **options})
    saving = takes(pipe.cache, {**defaults, **options}) if pipe.cache else {}
    size, arrays, window = pipe.task(pipe, **takes(pipe.task))
    arrays |= distilled
    prepares = (pipe.family.prepare, ip_adapter.prepare, beside.prepare, *pipe.extras)
    for prepare in prepares:
        arrays |= prepare(pipe, size, guided, **takes(prepare))
    taken = {k for function in (pipe.task, *prepares) for k in takes(function)} | heard
    options = {k: v for k, v in options.items() if k not in (*taken, *steered, *saving, "guidance_scale")}
    if options.pop("prompt", None) is not None:
        raise TypeError(f"{type(pipe).__name__} takes no prompt.")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: ask for at least one.")

    for of_loop in earlier.values():
        arrays["index"] = of_loop["index"][::num_images_per_prompt]
    prompts = max((len(a) for k, a in arrays.items() if np.ndim(a) and k not in STARTS), default=1)
    if prompts == 1:  # one prompt for several pictures to start from; noise may be given for each copy
        starts = {k: len(a) for k, a in arrays.items() if k in STARTS}
        for name in starts.keys() & {"latents", "timestep_cond"}:
            if starts[name] % num_images_per_prompt == 0:
                starts[name] //= num_images_per_prompt
        prompts = max([1, *starts.values()])
    batch = prompts * num_images_per_prompt
    inputs = {k: _per_image(k, a, prompts, num_images_per_prompt) for k, a in arrays.items()}
    if timesteps is None and sigmas is None:
        asked = num_inference_steps is not None
        num_inference_steps = num_inference_steps if asked else defaults["num_inference_steps"]
    asked = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas, **window, **options}
    plan = pipe.solver.plan(**(pipe.family.schedule(pipe, size, asked) if pipe.family.schedule else asked))
    rows = max(ROWS, 1 << (int(plan.steps) - 1).bit_length())
    for name in inputs.keys() & {"path", "noises"}:
        inputs[name] = _rows(name, inputs[name], int(plan.steps), rows)
    inputs |= {"index": np.arange(batch, dtype=np.int32), "size": size, "plan": plan.pad(rows)}
    tables = {k: inputs.pop(k) for k in inspect.signature(pipe.rule).parameters if k in inputs}
    inputs["guidance"] = strengths(pipe.rule, pipe.denoiser, steered, batch, int(plan.steps), rows) | tables
    inputs["cache"] = strengths(pipe.cache, pipe.denoiser, saving, 1, int(plan.steps), rows) if pipe.cache else {}
    return inputs | earlier


def before(pipe: "DiffusionPipeline", options: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The inputs of the loops that are run first, and which options these have heard.

    What begins with the name of a loop is its own; all else every loop hears whose family makes something of it.
    """
    inputs, heard = {}, set()
    for loop in pipe.before:
        part, prefix = loop.of(pipe), f"{loop.name}_"
        names = {*inspect.signature(part.family.prepare).parameters, "num_images_per_prompt"}
        of_loop = {k for k in options if k in names or k.startswith(prefix)}
        inputs[loop.name] = part.prepare_inputs(**{k.removeprefix(prefix): options[k] for k in of_loop})
        heard |= of_loop
    return inputs, heard


def _per_image(name: str, array: Any, prompts: int, copies: int) -> np.ndarray | jax.Array:
    """Values for each prompt as values for each image; what is the same for all is broadcast, a number stays one."""
    if isinstance(array, Size):
        return array
    if np.ndim(array) == 0:
        return np.asarray(array)
    if len(array) == prompts * copies and name in STARTS:
        return array
    if len(array) not in (1, prompts):
        raise ValueError(f"{name} has {len(array)} entries for {prompts} prompts; give one, or one for each.")
    return np.repeat(array, prompts * copies // len(array), axis=0)


def _rows(name: str, samples: Any, steps: int, rows: int) -> jax.Array:
    """Samples of a run [B, n, …] with as many rows as its plan. Raises ValueError unless there is one for each step."""
    if samples.shape[1] != steps:
        raise ValueError(f"{name} has samples for {samples.shape[1]} evaluations, but the run has {steps} of them.")
    return jnp.pad(samples, [(0, 0), (0, rows - steps)] + [(0, 0)] * (samples.ndim - 2))
