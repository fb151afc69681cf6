"""DiffEdit: what two prompts disagree about in a picture is found, and painted along the path of its inversion.

Reference: Couairon et al., DiffEdit: Diffusion-based Semantic Image Editing with Mask Guidance, 2022.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.core import Params
from flaxdiff.pipelines import inversion, tasks
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.generate import Inputs, Program, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.schedulers import Scheduler


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
