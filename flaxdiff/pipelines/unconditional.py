"""DDPM, DDIM and consistency models: pictures without a prompt, from a U-Net over pixels; of a class, where it has any.

Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020; Song et al., Denoising Diffusion Implicit
Models, 2020; Song et al., Consistency Models, 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flaxdiff import core
from flaxdiff import images as pictures
from flaxdiff.pipelines.beside import ANY
from flaxdiff.pipelines.generate import Cond, Family, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import Prepared, noise


def prepare(pipe: DiffusionPipeline, size: Size, guided: bool, batch_size: int = 1) -> dict[str, Any]:
    """Nothing but how many.

    Args:
      batch_size: pictures to make.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: ask for at least one.")
    return {"index": np.arange(batch_size, dtype=np.int32)}


def prepare_classes(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    batch_size: int = 1,
    class_labels: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """How many, and of which class.

    Args:
      batch_size: pictures to make.
      class_labels: a class for all, or one for each; by default any, drawn by the picture's key.
    """
    arrays, count = prepare(pipe, size, guided, batch_size), pipe.unet.config.num_class_embeds
    if count is None and class_labels is None:
        return arrays
    labels = np.full(1, ANY, np.int32) if class_labels is None else class_ids(pipe, class_labels, count)
    return arrays | {"class_labels": labels, "class_count": count}


def class_ids(pipe: DiffusionPipeline, labels: int | Sequence[int], count: int | None) -> np.ndarray:
    """Classes as int32 [B]. Raises ValueError unless they are whole numbers below `count`; None: there are none."""
    ids = np.atleast_1d(np.asarray(labels))
    if count is None:
        raise ValueError(f"{type(pipe).__name__}: this checkpoint knows no classes; leave out class_labels.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ((ids >= 0) & (ids < count)).all():
        raise ValueError(
            f"{type(pipe).__name__}: class_labels={labels!r}; give whole numbers from 0 to {count - 1}, one a picture."
        )
    return ids.astype(np.int32)


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """One branch, with nothing to tell."""
    return {"positive": {}}


def predict(networks: Networks, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
    """The U-Net's output."""
    return networks("unet", x, t, cond.get("class_labels"))


def latent_shape(specs: Mapping[str, core.Spec], size: Size) -> tuple[int, int, int]:
    """The shape of a picture: the network works on pixels."""
    return size.height, size.width, specs["unet"].config.in_channels


def decode(networks: Networks, images: jax.Array) -> jax.Array:
    """The sample is the picture."""
    return images


def encode_image(networks: Networks, images: jax.Array, keys: jax.Array, spread: jax.Array | float = 1.0) -> jax.Array:
    """The picture is the sample."""
    return images


UNCONDITIONAL = Family(prepare, encode, predict, latent_shape, decode, encode_image)


class DDPMPipeline(DiffusionPipeline):
    """Unconditional pictures, a thousand steps by default."""

    family = UNCONDITIONAL
    defaults = {"num_inference_steps": 1000, "guidance_scale": 1.0}


class DDIMPipeline(DiffusionPipeline):
    """Unconditional pictures, fifty steps by default; `eta` between 0 (DDIM) and 1 (as noisy as DDPM)."""

    family = UNCONDITIONAL
    defaults = {"num_inference_steps": 50, "guidance_scale": 1.0}


def prepare_nothing(pipe: DiffusionPipeline, size: Size, guided: bool) -> dict[str, Any]:
    """Nothing: the pictures that a run starts from, or sees beside, say how many there are."""
    return {}


def complete(
    pipe: DiffusionPipeline, image: Any = None, mask_image: Any = None, latents: jax.Array | None = None
) -> Prepared:
    """Start from noise, and keep to what is known of a picture.

    Args:
      image: Pillow pictures, or arrays [B, H, W, 3] in [0, 1].
      mask_image: Pillow pictures, or arrays [B, H, W, 1] in [0, 1]: what is at least half white is known; the rest is
        painted.
      latents: the noise to start from, of unit variance, in place of what the key gives.

    Raises:
      ValueError: no picture or no mask, or sizes that do not agree.
    """
    if image is None or mask_image is None:
        absent = "image" if image is None else "mask_image"
        raise ValueError(f"{type(pipe).__name__} completes a picture; give {absent}= as well.")
    pixels, known = pictures.to_array(image), pictures.to_mask(mask_image)
    size = Size(*pixels.shape[1:3])
    if known.shape[1:3] != pixels.shape[1:3]:
        raise ValueError(f"mask_image is {known.shape[1:3]}, and image {pixels.shape[1:3]}; they must agree.")
    arrays = {"image": pixels, "mask": 1 - known, "from_noise": np.float32(1)}
    return size, arrays | noise(pipe, size, latents), {}


class RePaintPipeline(DiffusionPipeline):
    """Paint what is not known of a picture with an unconditional network; `RePaintScheduler` goes back up now and then.

    `jump_length`, `jump_n_sample` and `eta` are options of a call.

    >>> import flaxdiff
    >>> spec = flaxdiff.UNet2DModel.from_config({"sample_size": 16})
    >>> pipe = RePaintPipeline((("unet", spec),), flaxdiff.RePaintScheduler())
    >>> inputs = pipe.prepare_inputs(image=np.ones((16, 16, 3)), mask_image=np.eye(16), num_inference_steps=20)
    >>> int(inputs["plan"].steps)
    110

    Reference: Lugmayr et al., RePaint: Inpainting using Denoising Diffusion Probabilistic Models, 2022.
    """

    family = UNCONDITIONAL._replace(prepare=prepare_nothing)
    task = staticmethod(complete)
    defaults = {"num_inference_steps": 250, "guidance_scale": 1.0}


class ConsistencyModelPipeline(DiffusionPipeline):
    """Pictures in one step by default; several go by `num_inference_steps`, or by `timesteps` of one's own.

    >>> import flaxdiff
    >>> spec = flaxdiff.UNet2DModel.from_config({"sample_size": 64, "num_class_embeds": 1000})
    >>> scheduler = flaxdiff.CMStochasticIterativeScheduler()
    >>> pipe = ConsistencyModelPipeline((("unet", spec),), scheduler)
    >>> inputs = pipe.prepare_inputs(class_labels=[145, 88], timesteps=[22, 0])
    >>> inputs["class_labels"], inputs["plan"].sigma[:2].round(2)
    (array([145,  88], dtype=int32), array([80.  ,  1.38], dtype=float32))
    """

    family = UNCONDITIONAL._replace(prepare=prepare_classes)
    defaults = {"num_inference_steps": 1, "guidance_scale": 1.0}
