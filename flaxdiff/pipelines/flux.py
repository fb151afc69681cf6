"""Flux: a flow transformer that reads CLIP's pooled text as it reads the time, and T5's tokens beside the picture's.

The picture is a latent of 16 channels, of which 2 x 2 make a token. What is called guidance_scale is a number that the
distilled network is told; a negative prompt counts where `true_cfg_scale` is more than 1.

Reference: Black Forest Labs, FLUX.1, 2024.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flaxdiff import images as pictures
from flaxdiff.adapters import ip_adapter
from flaxdiff.guidance import true_cfg
from flaxdiff.nn.packing import pack, places, unpack
from flaxdiff.pipelines import flow
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import (
    Prepared,
    check_channels,
    native_image_to_image,
    native_size,
    stride,
    text_to_image,
)
from flaxdiff.pipelines.tasks.inpaint import inpaint, need_both, paste_back
from flaxdiff.pipelines.text import branches, check_prompts, check_together, texts

PACK = 2  # latents along each side of a token
LONGEST = 512  # tokens of a text
# (height, width) in pixels of the pictures that Kontext was trained on
PREFERRED = ((1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800), (1248, 832), (1184, 880), (1104, 944))
PREFERRED = (*PREFERRED, (1024, 1024), *((w, h) for h, w in reversed(PREFERRED)))


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    prompt_2: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    negative_prompt_2: str | Sequence[str] | None = None,
    prompt_embeds: jax.Array | None = None,
    negative_prompt_embeds: jax.Array | None = None,
    pooled_prompt_embeds: jax.Array | None = None,
    negative_pooled_prompt_embeds: jax.Array | None = None,
    guidance_scale: Any = None,
    max_sequence_length: int = LONGEST,
) -> dict[str, Any]:
    """The prompts as tokens of both encoders, or as embeddings, and the strength that the network is told.

    Args:
      prompt, negative_prompt: what to draw and what to avoid; the latter counts where `true_cfg_scale` is more than 1.
      prompt_2, negative_prompt_2: the same for T5; by default what CLIP reads.
      prompt_embeds, pooled_prompt_embeds, …: in their place, [B, N, D] and [B, P].
      guidance_scale: for networks that were distilled with it, one number, or one for each image.
      max_sequence_length: of the text, in tokens of T5.

    Raises:
      ValueError: no prompt, embeddings of one encoder only, a text of more than 512 tokens, or a negative one of
        another length.
    """
    check_prompts(pipe, prompt, prompt_embeds)
    if not 0 < max_sequence_length <= LONGEST:
        raise ValueError(f"max_sequence_length={max_sequence_length}: Flux reads between 1 and {LONGEST} tokens.")
    arrays: dict[str, Any] = {}
    if any(getattr(spec.config, "guidance_embeds", False) for _, spec in pipe.specs):
        arrays["timestep_cond"] = np.atleast_1d(np.asarray(guidance_scale, np.float32))
    sources = {"": (prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)}
    if guided and not (negative_prompt is None and negative_prompt_embeds is None):
        negatives = negative_prompt_embeds, negative_pooled_prompt_embeds
        sources["negative_"] = negative_prompt, negative_prompt_2, *negatives
    for prefix, (text, text_2, embeds, pooled) in sources.items():
        check_together(**{f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled})
        if embeds is None:
            arrays[f"{prefix}prompt_ids"] = pipe.tokenizer(texts(text))
            arrays[f"{prefix}prompt_ids_2"] = pipe.tokenizer_2(texts(text_2 or text), max_sequence_length)
        else:
            arrays |= {f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled}
    of = lambda prefix: arrays.get(f"{prefix}prompt_embeds", arrays.get(f"{prefix}prompt_ids_2"))
    lengths = [np.shape(of(prefix))[1] for prefix in sources]
    if len(set(lengths)) > 1:
        raise ValueError(f"The prompt has {lengths[0]} tokens and its negative {lengths[1]}; give both as many.")
    return arrays


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch: T5's tokens, and CLIP's pooled state."""
    cond = {}
    for branch, prefix in branches(inputs).items():
        if f"{prefix}prompt_embeds" in inputs:
            text, pooled = inputs[f"{prefix}prompt_embeds"], inputs[f"{prefix}pooled_prompt_embeds"]
        else:
            text = networks("text_encoder_2", inputs[f"{prefix}prompt_ids_2"])
            pooled = networks("text_encoder", inputs[f"{prefix}prompt_ids"]).pooler_output
        cond[branch] = {"text": text, "pooled": pooled}
        if ip_adapter.named(networks.specs, ip_adapter.KIND):
            nothing = ((),) * networks.config("transformer").num_layers
            blocks = ip_adapter.encode(networks, inputs, branch, nothing, ())
            side_by_side = lambda *arrays: jnp.concatenate(arrays, 1)
            cond[branch]["pictures"] = tuple(jax.tree.map(side_by_side, *adapter) for adapter in zip(*blocks))
    if "reference" in inputs:
        latents = encode_mean(networks, jnp.asarray(inputs["reference"]), inputs["keys"])
        cond = {branch: {**told, "reference": latents} for branch, told in cond.items()}
    return cond


def times(networks: Networks, timesteps: jax.Array, cond: Cond, name: str = "transformer") -> Any:
    """What times [N], the pooled text and the guidance say to the blocks of a network."""
    strength = cond["timestep_cond"] if networks.config(name).guidance_embeds else None
    return networks(name, timesteps[:, None] / 1000, cond["pooled"], strength, method="times")


def seen(latents: Sequence[jax.Array]) -> tuple[jax.Array, np.ndarray]:
    """The tokens of one latent [B, H, W, C] after the other, and where they are."""
    grids = [(latent.shape[1] // PACK, latent.shape[2] // PACK) for latent in latents]
    where = np.concatenate([places(*grid, i) for i, grid in enumerate(grids)])
    return jnp.concatenate([pack(latent) for latent in latents], 1), where


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond, added: tuple = ()) -> jax.Array:
    """The velocity of latents [B, H, W, C]; a picture to change, where there is one, comes after them.

    `added`: what ControlNets add, as the transformer takes it.
    """
    further = [cond["reference"].astype(x.dtype)] if "reference" in cond else []
    tokens, where = seen([x, *further])
    more = {"pictures": cond["pictures"]} if "pictures" in cond else {}
    velocity = networks("transformer", tokens, cond["text"], None, t, where, None, None, *added, **more)
    return unpack(velocity[:, : x.shape[1] * x.shape[2] // PACK**2], *x.shape[1:3])


def encode_mean(networks: Networks, images: jax.Array, keys: jax.Array, spread: jax.Array | float = 0.0) -> jax.Array:
    """As `stable_diffusion.encode_image`, but the posterior's mean."""
    return sd.encode_image(networks, images, keys, spread)


FLUX = sd.STABLE_DIFFUSION._replace(
    prepare=prepare,
    encode=encode,
    predict=predict,
    times=times,
    distilled=None,
    loop="transformer|controlnet",
    schedule=flow.even,
    pack=PACK,
)
KONTEXT = FLUX._replace(encode_image=encode_mean)


def prepare_control(pipe: DiffusionPipeline, size: Size, guided: bool, control_image: Any = None) -> dict[str, Any]:
    """The picture whose latent lies beside the sample.

    Args:
      control_image: edges, depth and the like: Pillow pictures, or arrays [B, H, W, 3] in [0, 1]; they are resized.

    Raises:
      ValueError: no picture, or a network that takes none.
    """
    if control_image is None:
        raise ValueError(f"{type(pipe).__name__} follows a picture; give control_image=.")
    check_channels(pipe, 0)
    pixels, one = pictures.to_array(control_image, size.height, size.width), np.float32(1)
    return {"beside_image": pixels, "beside_gain": one, "beside_spread": one}


def preferred(image: Any, auto_resize: bool, step: int) -> Size:
    """The size that Kontext sees a picture in: of those it was trained on the one of nearest proportions."""
    one = image[0] if isinstance(image, list | tuple) else image
    height, width = (one.height, one.width) if isinstance(one, Image.Image) else np.shape(one)[-3:-1]
    height, width = height // step * step, width // step * step
    if auto_resize:
        _, width, height = min((abs(width / height - w / h), w, h) for h, w in PREFERRED)
    return Size(height // step * step, width // step * step)


def kontext(
    pipe: DiffusionPipeline,
    image: Any = None,
    height: int | None = None,
    width: int | None = None,
    latents: jax.Array | None = None,
    max_area: int = 1024**2,
    _auto_resize: bool = True,
) -> Prepared:
    """Start from noise, with a picture to change before the network's eyes, or without one.

    Args:
      image: Pillow pictures, or arrays [B, H, W, 3] in [0, 1]; resized to what is nearest to them in `PREFERRED`.
      height, width: of the result: their proportions count, by default a square's.
      latents: the noise to start from, of unit variance, in place of what the key gives.
      max_area: of the result in pixels.
      _auto_resize: whether to resize `image` so.
    """
    native, step = native_size(pipe), stride(pipe)
    ratio = (width or native.width) / (height or native.height)
    sides = (round((max_area / ratio) ** 0.5), round((max_area * ratio) ** 0.5))
    size, arrays, window = text_to_image(pipe, *(side // step * step for side in sides), latents)
    if image is not None:
        shown = preferred(image, _auto_resize, step)
        arrays |= {"reference": pictures.to_array(image, shown.height, shown.width)}
    return size, arrays, window


def kontext_inpaint(
    pipe: DiffusionPipeline,
    image: Any = None,
    mask_image: Any = None,
    image_reference: Any = None,
    strength: float | None = None,
    padding_mask_crop: int | None = None,
    latents: jax.Array | None = None,
    height: int | None = None,
    width: int | None = None,
    max_area: int | None = None,
    _auto_resize: bool = True,
) -> Prepared:
    """Paint over a part of a picture, with that picture or another before the network's eyes.

    Args:
      image, mask_image, strength, padding_mask_crop, latents: as of `inpaint`; the size is that `kontext` sees it in.
      height, width, max_area: of no effect, as in diffusers.
      image_reference: what the network sees in place of the picture.
      _auto_resize: as of `kontext`.

    Raises:
      ValueError: as `inpaint`.
    """
    need_both(pipe, image, mask_image)
    size = preferred(image, _auto_resize, stride(pipe))
    options = dict(strength=strength, padding_mask_crop=padding_mask_crop, latents=latents)
    size, arrays, window = inpaint(pipe, image, mask_image, size.height, size.width, **options)
    shown = size if image_reference is None else preferred(image_reference, _auto_resize, stride(pipe))
    other = None if image_reference is None else pictures.to_array(image_reference, shown.height, shown.width)
    return size, arrays | {"reference": arrays["image"] if other is None else other}, window


class FluxPipeline(DiffusionPipeline):
    """Text to image with Flux.

    >>> import flaxdiff
    >>> stages = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    >>> vae = dict(stages, latent_channels=16, block_out_channels=[128, 256, 512, 512])
    >>> transformer = flaxdiff.FluxTransformer2DModel.from_config({"guidance_embeds": True})
    >>> specs = ("transformer", transformer), ("vae", flaxdiff.AutoencoderKL.from_config(vae))
    >>> pipe = FluxPipeline(specs, flaxdiff.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    >>> text = dict(prompt_embeds=np.zeros((1, 512, 4096)), pooled_prompt_embeds=np.zeros((1, 768)))
    >>> inputs = pipe.prepare_inputs(**text, num_inference_steps=4)
    >>> inputs["size"], inputs["plan"].timesteps[:4].astype(int), inputs["timestep_cond"]
    (Size(height=1024, width=1024), array([1000,  904,  759,  512]), array([3.5], dtype=float32))
    """

    family = FLUX
    guides, asks = staticmethod(true_cfg), "true_cfg_scale"
    defaults = {"num_inference_steps": 28, "guidance_scale": 3.5, "true_cfg_scale": 1.0}


class FluxImg2ImgPipeline(FluxPipeline):
    """Image to image with Flux."""

    task = staticmethod(native_image_to_image)
    defaults = {**FluxPipeline.defaults, "guidance_scale": 7.0, "strength": 0.6}


class FluxInpaintPipeline(FluxPipeline):
    """Paint over a part of a picture with Flux, which is put back around it after each step."""

    task, finish = staticmethod(inpaint), staticmethod(paste_back)
    defaults = {**FluxPipeline.defaults, "guidance_scale": 7.0, "strength": 0.6}


class FluxFillPipeline(FluxPipeline):
    """Paint over a part of a picture with a transformer that sees the rest of it and the mask."""

    task, finish = staticmethod(inpaint), staticmethod(paste_back)
    defaults = {**FluxPipeline.defaults, "num_inference_steps": 50, "guidance_scale": 30.0, "strength": 1.0}


class FluxControlPipeline(FluxPipeline):
    """Text to image with a transformer that sees the latent of `control_image` beside the sample."""

    extras, controls = (prepare_control,), True


class FluxControlImg2ImgPipeline(FluxControlPipeline):
    """Image to image with a transformer that sees the latent of `control_image` beside the sample."""

    task = staticmethod(native_image_to_image)
    defaults = FluxImg2ImgPipeline.defaults


class FluxControlInpaintPipeline(FluxControlPipeline):
    """Paint over a part of a picture with a transformer that sees the latent of `control_image` beside the sample."""

    task, finish = staticmethod(inpaint), staticmethod(paste_back)
    defaults = FluxInpaintPipeline.defaults


class FluxKontextPipeline(FluxPipeline):
    """Change `image` as the prompt says, with FLUX.1 Kontext; without one text to image."""

    family, task = KONTEXT, staticmethod(kontext)


class FluxKontextInpaintPipeline(FluxPipeline):
    """Paint over a part of a picture with FLUX.1 Kontext, which sees it, or `image_reference`."""

    family, task, finish = KONTEXT, staticmethod(kontext_inpaint), staticmethod(paste_back)
    defaults = {**FluxPipeline.defaults, "strength": 1.0}
