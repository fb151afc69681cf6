"""Tasks: what a run starts from. A task only prepares arrays; the loop is the same for all.

Each takes the pipeline and what its call was given, and returns the size of the picture, arrays for the inputs (see
`generate` and `beside`), and which part of the schedule to run. The plain ones are here, others in files of their own.
"""

import inspect
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from PIL import Image

from flaxdiff import images as pictures
from flaxdiff.pipelines.generate import Size

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

Prepared = tuple[Size, dict[str, Any], dict[str, Any]]
# what stands for options that `prepare_inputs` cannot do without, where there is nothing to say yet
BLANK: dict[str, Any] = dict.fromkeys(("prompt", "source_subject_category", "target_subject_category"), "")
BLANK |= dict.fromkeys(("example_image", "reference_image"), Image.new("RGB", (1, 1)))


def text_to_image(
    pipe: "DiffusionPipeline",
    height: int | None = None,
    width: int | None = None,
    latents: jax.Array | None = None,
) -> Prepared:
    """Start from noise.

    Args:
      height, width: of the picture in pixels; by default what the network was trained on.
      latents: the noise to start from [B, h, w, C], of unit variance, in place of what the key gives.

    Raises:
      ValueError: a size that the networks do not divide.
    """
    default = native_size(pipe)
    size = Size(height or default.height, width or default.width)
    check_size(pipe, size)
    return size, noise(pipe, size, latents), {}


def image_to_image(
    pipe: "DiffusionPipeline",
    image: Any = None,
    strength: float | None = None,
    denoising_start: float | None = None,
    latents: jax.Array | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Prepared:
    """Start from a picture under noise.

    Args:
      image: Pillow pictures, or arrays [B, H, W, 3] in [0, 1], or latents [B, h, w, Z] as `output_type="latent"`
        returns them.
      strength: how much of the schedule to run: near 0 keeps the picture, 1 forgets it.
      denoising_start: begin where this share of the denoising is done, on latents that are as noisy as that.
      latents: the noise to add, of unit variance, in place of what the key gives.
      height, width: of the result in pixels, by default the picture's.

    Raises:
      ValueError: no picture, a size that the networks do not divide, a strength outside (0, 1].
    """
    need(pipe, image)
    if strength is not None and denoising_start is not None:
        raise ValueError("strength and denoising_start both say where to begin; give one of them.")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must lie in (0, 1].")
    if is_latents(pipe, image):
        size = Size(*(side * vae_factor(pipe) for side in image.shape[1:3]))
        start = {"image_latents" if denoising_start is None else "noisy_latents": image}
    else:
        start = {"image": pictures.to_array(image, height, width)}
        size = Size(*start["image"].shape[1:3])
    check_size(pipe, size)
    window = {"strength": strength or pipe.defaults["strength"]} if denoising_start is None else {}
    window |= {} if denoising_start is None else {"denoising_start": denoising_start}
    return size, start | noise(pipe, size, latents), window


def native_image_to_image(
    pipe: "DiffusionPipeline",
    image: Any = None,
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    latents: jax.Array | None = None,
) -> Prepared:
    """As `image_to_image`, but the picture is resized, by default to what the network was trained on."""
    native = native_size(pipe)
    return image_to_image(pipe, image, strength, None, latents, height or native.height, width or native.width)


def distilled_image_to_image(
    pipe: "DiffusionPipeline", image: Any = None, strength: float | None = None, latents: jax.Array | None = None
) -> Prepared:
    """As `image_to_image`, but all steps are run, spread over that share of the times the network was distilled at."""
    size, arrays, window = image_to_image(pipe, image, strength, None, latents)
    return size, arrays, {"origin_share": window["strength"]}


def need(pipe: "DiffusionPipeline", image: Any) -> None:
    """Raise ValueError where there is no picture."""
    if image is None:
        raise ValueError(f"{type(pipe).__name__} starts from a picture; give image=.")


def check_channels(pipe: "DiffusionPipeline", beside: int) -> None:
    """Raise ValueError unless the denoiser takes so many channels beside the sample, and those of a control image."""
    latent, room, control = pipe.autoencoder.config.latent_channels, room_beside(pipe), control_channels(pipe)
    if room != beside:
        raise ValueError(
            f"{type(pipe).__name__} gives the network {latent} channels of the sample and {control + beside} beside "
            f"it, but it takes {latent + control + room}; use a checkpoint that was trained for this task."
        )


def room_beside(pipe: "DiffusionPipeline") -> int:
    """Channels that the denoiser takes beside those of the sample and of a control image."""
    channels = pipe.denoiser.config.in_channels // pipe.family.pack**2
    return channels - pipe.autoencoder.config.latent_channels - control_channels(pipe)


def control_channels(pipe: "DiffusionPipeline") -> int:
    """Channels of the latent of a control image beside the sample."""
    return pipe.controls * pipe.autoencoder.config.latent_channels


def is_latents(pipe: "DiffusionPipeline", image: Any) -> bool:
    """Whether an array [B, h, w, C] is not a picture but what `output_type="latent"` returns."""
    return getattr(image, "ndim", 0) == 4 and image.shape[-1] == pipe.autoencoder.config.latent_channels != 3


def noise(pipe: "DiffusionPipeline", size: Size, latents: Any) -> dict[str, Any]:
    """Noise that was given, if any. Raises ValueError unless it has the shape of the picture's latents."""
    if latents is None:
        return {}
    expected = pipe.family.latent_shape(dict(pipe.specs), size)
    if np.shape(latents)[1:] != expected:
        raise ValueError(f"latents have shape {np.shape(latents)}; expected [B, *{expected}] for {size}.")
    return {"latents": latents}


def vae_factor(pipe: "DiffusionPipeline") -> int:
    """Pixels to a latent along each side; 1 without an autoencoder."""
    return 1 if pipe.autoencoder is None else 2 ** (len(pipe.autoencoder.config.block_out_channels) - 1)


def stride(pipe: "DiffusionPipeline") -> int:
    """Pixels to a token along each side; to a latent where there are no tokens."""
    return vae_factor(pipe) * pipe.family.pack * getattr(pipe.denoiser.config, "patch_size", 1)


def native_size(pipe: "DiffusionPipeline") -> Size:
    """The size that the denoiser was trained on, in pixels."""
    height, width = np.broadcast_to(pipe.denoiser.config.sample_size, 2)
    return Size(int(height) * vae_factor(pipe), int(width) * vae_factor(pipe))


def blank_inputs(pipe: "DiffusionPipeline", batch: int = 1, **options: Any) -> dict[str, Any]:
    """What `prepare_inputs` makes of blank prompts, and of blank pictures where the task starts from some.

    Args:
      batch: pictures to make.
      **options: height, width, and others of `prepare_inputs`.
    """
    hears = (pipe.family.prepare, *(loop.pipeline.family.prepare for loop in pipe.before), pipe.task)
    takes = {name for function in hears for name in inspect.signature(function).parameters}
    options |= {name: [blank] * batch for name, blank in BLANK.items() if name in takes}
    options |= {"batch_size": batch} if "batch_size" in takes else {}
    options |= {"class_labels": [0] * batch} if "class_labels" in takes and "batch_size" not in takes else {}
    blank = Image.new("RGB", (1, 1))
    if "image" in takes:
        size = native_size(pipe)
        asked = options.get if "height" in takes else options.pop
        height, width = (asked(side, None) or getattr(size, side) for side in ("height", "width"))
        options["image"], blank = np.zeros((batch, height, width, 3), np.float32), blank.resize((width, height))
        if "mask_image" in takes:
            options["mask_image"] = np.ones((batch, height, width, 1), np.float32)
    nets = sum(name.split("_")[0] in pipe.steers for name, _ in pipe.specs)
    if nets or pipe.controls:
        led_by = "image" if "image" in takes and "strength" not in pipe.defaults else "control_image"
        options[led_by] = [blank] * nets if nets > 1 else blank
        if any("control_mask" in inspect.signature(more).parameters for more in pipe.extras):
            options["control_mask"] = Image.new("L", (1, 1))
    return pipe.prepare_inputs(**options)


def check_size(pipe: "DiffusionPipeline", size: Size) -> None:
    """Raise ValueError unless the networks divide this size."""
    factor = stride(pipe)
    if size.height % factor or size.width % factor or min(size.height, size.width) <= 0:
        near = [max(round(n / factor), 1) * factor for n in (size.height, size.width)]
        raise ValueError(
            f"height={size.height}, width={size.width}: {type(pipe).__name__} needs positive multiples of {factor}; "
            f"the nearest are {near[0]} and {near[1]}."
        )
