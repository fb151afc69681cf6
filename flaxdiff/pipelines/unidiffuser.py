"""UniDiffuser: a picture of a text, a text for a picture, either of nothing, or both at once.

One network takes the noise off the two halves, a picture (its latent and CLIP's embedding of it) and an embedded text,
each at a time of its own. So what is asked for is a matter of times: a half that is known has time 0, one of which
nothing is known is noise at the last time, and one that is made goes through the times of the run. The sample of a run
is made of the halves that it makes: a picture [B, K], a text [B, N, T], or both in a row [B, K + N T].

The opposite of a known half is not another prompt but none: noise at the last time, drawn anew at each evaluation.
Where both halves are made, each is compared with what the network says of it while it knows nothing of the other.

Reference: Bao et al., One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale, 2023.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import core
from flaxdiff import images as pictures
from flaxdiff.guidance.presets import of_each_half
from flaxdiff.pipelines import inputs as preparing
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.calling import presented
from flaxdiff.pipelines.generate import Cond, Family, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import Prepared, native_size
from flaxdiff.pipelines.text import check_prompts, texts
from flaxdiff.schedulers.tables import folded

# what to make -> the halves that are made, and the one that is given
MODES = {
    "text2img": (("image",), "text"),
    "img2text": (("text",), "image"),
    "img": (("image",), None),
    "text": (("text",), None),
    "joint": (("image", "text"), None),
}
LATENTS = ("vae_latents", "clip_latents", "prompt_latents")
ANEW = 7  # folded into an image's key for the noise of each evaluation, see beside.py
MADE = -1.0  # in the place of a time: that of the run


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sheet(Size):
    """The size of the picture, and what is made: one of `MODES`."""

    mode: str = "joint"

    @property
    def makes(self) -> tuple[str, ...]:
        """The halves that the sample has."""
        return MODES[self.mode][0]

    @property
    def given(self) -> str | None:
        """The half that is known."""
        return MODES[self.mode][1]


class Told(NamedTuple):
    """What a branch tells the network of a half."""

    value: jax.Array  # [B, …] as of `halves`
    time: jax.Array  # [B], `MADE` where the sample has the half, whatever the value
    anew: jax.Array  # [B] bool: noise of this evaluation in place of the value


class Words(NamedTuple):
    """What comes of a run that makes a text."""

    images: jax.Array | None  # [B, H, W, 3], where there are some
    tokens: jax.Array  # [B, W] int32
    lengths: jax.Array  # [B] int32, how many of them are the text


class ImageTextPipelineOutput(NamedTuple):
    """What a call returns: pictures as Pillow's or an array, and texts; None for what was not asked for."""

    images: Any
    text: list[str] | None


# --- what is asked for -----------------------------------------------------------------------------------------------


def mode_of(pipe: DiffusionPipeline, prompted: bool, pictured: bool, noise: set[str]) -> str:
    """What to make where a call does not say: as the pipeline is set to, or what goes with what is given.

    Args:
      prompted, pictured: whether there is a prompt, and a picture.
      noise: the names of the noise that is given.
    """
    if (mode := dict(dict(pipe.settings).get("defaults", ())).get("mode")) is not None:
        return mode
    if prompted and pictured:
        warnings.warn("There are a prompt and a picture, and the prompt is drawn; say which by mode=.", stacklevel=5)
    if prompted or pictured:
        return "text2img" if prompted else "img2text"
    alone = {frozenset(LATENTS[:2]): "img", frozenset(LATENTS[2:]): "text"}
    return alone.get(frozenset(noise), "joint")


def task(
    pipe: DiffusionPipeline,
    mode: str | None = None,
    prompt: str | Sequence[str] | None = None,
    prompt_embeds: jax.Array | None = None,
    image: Any = None,
    height: int | None = None,
    width: int | None = None,
    latents: jax.Array | None = None,
    vae_latents: jax.Array | None = None,
    clip_latents: jax.Array | None = None,
    prompt_latents: jax.Array | None = None,
) -> Prepared:
    """Start from noise, in the halves that are made.

    Args:
      mode: "text2img", "img2text", "img", "text" or "joint"; by default what goes with what is given.
      prompt, prompt_embeds: what to draw, as text or as the text encoder's states [B, N, D]; for "text2img".
      image: what to describe: Pillow pictures, or arrays [B, H, W, 3] in [0, 1]; for "img2text".
      height, width: of the picture in pixels; a network has places for one size.
      latents: the noise to start from, of unit variance and of the shape that `output_type="latent"` returns; or
      vae_latents, clip_latents, prompt_latents: its parts, [B, h, w, C], [B, 1, I] and, as the text encoder has it,
        [B, N, D].

    Raises:
      ValueError: an unknown mode, nothing to make it of, another size than the network's, noise of another shape.
    """
    given = {"latents": latents, **dict(zip(LATENTS, (vae_latents, clip_latents, prompt_latents)))}
    arrays = {name: np.asarray(a, np.float32) for name, a in given.items() if a is not None}
    prompted, native = prompt is not None or prompt_embeds is not None, native_size(pipe)
    mode = mode or mode_of(pipe, prompted, image is not None, set(arrays))
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known; use one of {list(MODES)}.")
    size = Sheet(height or native.height, width or native.width, mode)
    _check_noise(pipe, size, arrays)
    if size.given == "image":
        if image is None:
            raise ValueError(f"{type(pipe).__name__} describes a picture; give image=.")
        shown = pictures.to_array(image)
        size = Sheet(*shown.shape[1:3], mode)
        arrays |= {"image": shown, "image_pixels": pictures.clip_pixels(image, pipe.image_encoder.config.image_size)}
    if size.given == "text":
        check_prompts(pipe, prompt, prompt_embeds)
        embedded = prompt_embeds is not None
        arrays |= {"prompt_embeds": prompt_embeds} if embedded else {"prompt_ids": pipe.clip_tokenizer(texts(prompt))}
    if (size.height, size.width) != (native.height, native.width):
        raise ValueError(
            f"{type(pipe).__name__}: pictures of {size.height} x {size.width} pixels; this network has places for "
            f"{native.height} x {native.width} alone."
        )
    return size, arrays, {}


def shapes(specs: Mapping[str, core.Spec]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parts of the noise, for one picture and text."""
    c, width = specs["unet"].config, specs["text_encoder"].config.hidden_size
    parts = (c.sample_size, c.sample_size, c.in_channels), (1, c.clip_img_dim), (c.num_text_tokens, width)
    return dict(zip(LATENTS, parts))


def _check_noise(pipe: DiffusionPipeline, size: Sheet, given: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError unless noise has the shapes that it is to have."""
    specs = dict(pipe.specs)
    for name, shape in (shapes(specs) | {"latents": latent_shape(specs, size)}).items():
        if name in given and given[name].shape[1:] != shape:
            raise ValueError(f"{name} have shape {given[name].shape}; expected [B, {', '.join(map(str, shape))}].")


def prepare(pipe: DiffusionPipeline, size: Sheet, guided: bool, data_type: int = 1) -> dict[str, Any]:
    """What the network is told; the last time, where a branch is to know nothing of a half; what ends a text.

    Args:
      data_type: 0 or 1: what sort of data the result is to be like, for networks that were told.
    """
    arrays: dict[str, Any] = {"data_type": np.int32(data_type)}
    if guided or size.mode in ("img", "text"):
        arrays["last_time"] = np.float32(pipe.scheduler.num_train_timesteps)
    if "text" in size.makes:
        arrays["decoder_end"] = np.int32(pipe.text_tokenizer.loaded.eos_token_id)
    return arrays


# --- the two halves --------------------------------------------------------------------------------------------------


def halves(c: Any, x: jax.Array) -> dict[str, jax.Array]:
    """A sample as its halves, a picture [B, K] and a text [B, N, T]; `c`: the network's configuration."""
    if x.ndim == 3:
        return {"text": x}
    image, text = jnp.split(x, [pixels(c)], 1)
    return {"image": image} | ({"text": text.reshape(len(x), -1, c.text_dim)} if text.shape[1] else {})


def joined(parts: Mapping[str, jax.Array]) -> jax.Array:
    """The sample of some halves."""
    if "image" not in parts:
        return parts["text"]
    flat = [parts[half].reshape(len(parts[half]), -1) for half in ("image", "text") if half in parts]
    return jnp.concatenate(flat, 1)


def pixels(c: Any) -> int:
    """Numbers of a picture: K."""
    return c.sample_size**2 * c.in_channels + c.clip_img_dim


def latent_shape(specs: Mapping[str, core.Spec], size: Sheet) -> tuple[int, ...]:
    """The shape of a sample."""
    c = specs["unet"].config
    k, text = pixels(c), (c.num_text_tokens, c.text_dim)
    return {("image",): (k,), ("text",): text}.get(size.makes, (k + math.prod(text),))


def noise(networks: Networks, inputs: Inputs) -> dict[str, jax.Array]:
    """Unit noise for both halves, given or drawn from the keys; that of a text is projected as a text would be."""
    drawn = []
    for i, (name, shape) in enumerate(shapes(networks.specs).items()):
        draw = lambda key, i=i, shape=shape: jax.random.normal(jax.random.fold_in(key, i), shape)
        drawn.append(jnp.asarray(inputs[name], jnp.float32) if name in inputs else jax.vmap(draw)(inputs["keys"]))
    latent, embedding, text = (jnp.asarray(inputs["plan"].init_noise_sigma) * x for x in drawn)
    flat = [x.reshape(len(x), -1) for x in (latent, embedding)]
    text = networks("text_decoder", text, method="encode").astype(jnp.float32)
    return {"image": jnp.concatenate(flat, 1), "text": text}


def start(networks: Networks, keys: jax.Array, inputs: Inputs) -> tuple[jax.Array, None]:
    """Noise in the halves that are made."""
    if "latents" in inputs:
        return jnp.asarray(inputs["plan"].init_noise_sigma) * jnp.asarray(inputs["latents"], jnp.float32), None
    drawn = noise(networks, {**inputs, "keys": keys})
    return joined({half: drawn[half] for half in inputs["size"].makes}), None


def known(networks: Networks, inputs: Inputs) -> jax.Array:
    """The half that is given."""
    if inputs["size"].given == "image":
        latent = sd.encode_image(networks, inputs["image"], folded(inputs["keys"], 1))
        embedding = networks("image_encoder", inputs["image_pixels"]).image_embeds
        return jnp.concatenate([latent.reshape(len(latent), -1), embedding], 1)
    given = "prompt_embeds" in inputs
    text = inputs["prompt_embeds"] if given else networks("text_encoder", inputs["prompt_ids"]).last_hidden_state
    return networks("text_decoder", text, method="encode")


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The half that is not made, known or noise; and when guided, branches that know nothing of one half."""
    b, size, last = len(inputs["keys"]), inputs["size"], inputs.get("last_time")
    values = noise(networks, inputs) | ({size.given: known(networks, inputs)} if size.given else {})
    tell = lambda half, time, anew=False: {
        half: Told(values[half].astype(jnp.float32), jnp.full(b, time, jnp.float32), jnp.full(b, anew))
    }
    if size.given:
        told = {"positive": tell(size.given, 0)} | ({} if last is None else {"negative": tell(size.given, last, True)})
    elif size.mode != "joint":
        (other,) = {"image", "text"} - {*size.makes}
        told = {"positive": tell(other, last)}
    elif last is None:
        told = {"positive": {}}
    else:
        image, text = tell("image", MADE), tell("text", MADE)
        told = {"positive": image | text, "negative": image | tell("text", last, True)}
        told["negative_text"] = tell("image", last, True) | text
    keys = folded(inputs["keys"], ANEW)
    shared = {"keys": keys, "data_type": jnp.broadcast_to(jnp.asarray(inputs["data_type"]), b)}
    return {branch: shared | cond for branch, cond in told.items()}


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> jax.Array:
    """Each time, and which evaluation it is: [N, 1, 2]."""
    return jnp.stack([timesteps, jnp.arange(len(timesteps), dtype=timesteps.dtype)], -1)[:, None]


def predict(networks: Networks, x: jax.Array, time: jax.Array, cond: Cond) -> jax.Array:
    """The noise in the halves of the sample; nothing of one that the branch does not know."""
    c, (t, row) = networks.config("unet"), time[0]
    made = halves(c, x)
    keys = folded(cond["keys"], row.astype(jnp.int32))
    seen, when = dict(made), dict.fromkeys(made, jnp.broadcast_to(t, len(x)))
    for i, half in enumerate(("image", "text")):
        if half not in cond:
            continue
        value, at, anew = cond[half]
        draw = lambda key, i=i, shape=value.shape[1:]: jax.random.normal(jax.random.fold_in(key, i), shape)
        each = lambda flags, like=value: flags.reshape(-1, *(1,) * (like.ndim - 1))
        value = jnp.where(each(anew), jax.vmap(draw)(keys), value)
        seen[half] = jnp.where(each(at == MADE), made[half], value) if half in made else value
        when[half] = jnp.where(at == MADE, t, at)
    latent, embedding = jnp.split(seen["image"], [pixels(c) - c.clip_img_dim], 1)
    latent = latent.reshape(-1, c.sample_size, c.sample_size, c.in_channels)
    told = latent, embedding[:, None], seen["text"], when["image"], when["text"]
    out = networks("unet", *told, cond["data_type"])
    flat = [a.reshape(len(x), -1) for a in (out.latent, out.image)]
    says = {"image": jnp.concatenate(flat, 1), "text": out.text}
    knows = lambda half, a: jnp.where((cond[half].time == MADE).reshape(-1, *(1,) * (a.ndim - 1)), a, 0)
    return joined({half: knows(half, says[half]) if half in cond else says[half] for half in made})


def decode(networks: Networks, x: jax.Array, end: jax.Array | None = None) -> jax.Array | Words:
    """The picture [B, H, W, 3] in [-1, 1] of a sample; where it has a text, the words of that as well."""
    c = networks.config("unet")
    made, images = halves(c, x), None
    if "image" in made:
        latent = made["image"][:, : -c.clip_img_dim].reshape(-1, c.sample_size, c.sample_size, c.in_channels)
        images = sd.decode(networks, latent)
    return (
        images if "text" not in made else Words(images, *networks("text_decoder", made["text"], end, method="generate"))
    )


UNIDIFFUSER = Family(prepare, encode, predict, latent_shape, decode, times=times, start=start)


# --- the pipeline ----------------------------------------------------------------------------------------------------


class UniDiffuserPipeline(DiffusionPipeline):
    """Pictures, texts, or both: `.images` and `.text`, each None where it was not asked for.

    A prompt is drawn and a picture is described; with neither, both are made. `mode` says otherwise.

        captions = pipe(params, key, image=picture).text
        variations = pipe(params, key, prompt=captions).images
    """

    family = UNIDIFFUSER
    task = staticmethod(task)
    guides = staticmethod(of_each_half)
    reads = ("image_encoder",)
    processor = "clip_image_processor"
    defaults = {"num_inference_steps": 50, "guidance_scale": 8.0}

    def prepare_inputs(
        self, prompt: Any = None, *, num_prompts_per_image: int | None = None, **options: Any
    ) -> dict[str, Any]:
        """As of every pipeline; `num_prompts_per_image`: texts for each picture.

        Where both are made there are as many as of the fewer.
        """
        prompted = prompt is not None or options.get("prompt_embeds") is not None
        pictured = options.get("image") is not None and not prompted
        noise = {name for name in LATENTS if options.get(name) is not None}
        makes, _ = MODES.get(options.get("mode") or mode_of(self, prompted, pictured, noise), MODES["joint"])
        counts = {"image": options.pop("num_images_per_prompt", None), "text": num_prompts_per_image}
        asked = [counts[half] for half in makes if counts[half] is not None]
        return preparing.prepare_inputs(self, prompt, num_images_per_prompt=min(asked, default=1), **options)

    def present(
        self, made: Any, flags: list[bool] | None, output_type: str, options: Mapping[str, Any]
    ) -> ImageTextPipelineOutput:
        """What was decoded, as pictures and texts."""
        images, text = (made.images, made) if isinstance(made, Words) else (made, None)
        if images is not None:
            images = presented(self, images, flags, output_type, options).images
        if text is not None:
            read = self.text_tokenizer.loaded.decode
            text = [read(row[:n], skip_special_tokens=True) for row, n in zip(text.tokens, text.lengths)]
        return ImageTextPipelineOutput(images, text)

    def in_mode(self, mode: str | None) -> "UniDiffuserPipeline":
        """The same pipeline, whose calls make what a mode says; None: what goes with what they are given."""
        return self.by_default(mode=mode)

    set_text_mode = functools.partialmethod(in_mode, "text")
    set_image_mode = functools.partialmethod(in_mode, "img")
    set_text_to_image_mode = functools.partialmethod(in_mode, "text2img")
    set_image_to_text_mode = functools.partialmethod(in_mode, "img2text")
    set_joint_mode = functools.partialmethod(in_mode, "joint")
    reset_mode = functools.partialmethod(in_mode, None)
