"""GLIGEN: objects in boxes, told by phrases, or by phrases and pictures, in a picture of a prompt.

What the U-Net makes of the objects is worked out once; that they count in the first steps alone is a weight at each
row of the plan. Into a picture that is given, objects are painted where their boxes are: the rest is put back before
each step.

Reference: Li et al., GLIGEN: Open-Set Grounded Text-to-Image Generation, 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flaxdiff import images as pictures
from flaxdiff.adapters import control
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import check_channels, vae_factor

Box = Sequence[float]  # left, top, right, bottom, from 0 to 1
OBJECTS = 30  # places for objects, as the networks were trained with
STYLE = (0.0, 1.0, 0.0, 1.0)  # no box, but the place of a picture whose style is meant
LENGTH = 28.7  # of the feature of a picture


def check_boxes(boxes: Sequence[Box], *also: tuple[float, ...]) -> np.ndarray:
    """Boxes as float32 [N, 4].

    Args:
      boxes: (left, top, right, bottom), each from 0 to 1.
      also: what counts as a box besides.

    Raises:
      ValueError: too many of them, not four numbers, not within the picture, or with nothing inside.

    >>> check_boxes([(0.1, 0.2, 0.5, 0.9)]).shape
    (1, 4)
    """
    if len(boxes) > OBJECTS:
        raise ValueError(f"gligen_boxes has {len(boxes)} boxes; there is room for {OBJECTS}.")
    for box in boxes:
        if np.shape(box) != (4,) or not np.isfinite(np.asarray(box, np.float64)).all():
            raise ValueError(f"gligen_boxes: {box!r} is no box; give four numbers, left, top, right and bottom.")
        (left, top, right, bottom), asked = box, tuple(map(float, box))
        if asked not in also and not (0 <= min(asked) and max(asked) <= 1):
            raise ValueError(f"gligen_boxes: {asked} leaves the picture; its sides lie from 0 to 1, whatever the size.")
        if asked not in also and not (left < right and top < bottom):
            raise ValueError(f"gligen_boxes: {asked} has nothing inside; left < right and top < bottom in a box.")
    return np.asarray(boxes, np.float32).reshape(-1, 4)


def _same(name: str, given: Sequence[Any], boxes: Sequence[Box]) -> None:
    if len(given) != len(boxes):
        raise ValueError(f"{name} has {len(given)} entries for {len(boxes)} gligen_boxes; give one for each.")


def _filled(array: np.ndarray) -> np.ndarray:
    """[N, …] with zeros behind, for all places: [1, 30, …]."""
    return np.pad(array, ((0, OBJECTS - len(array)), *((0, 0),) * (array.ndim - 1)))[None]


def _told(pipe: DiffusionPipeline, phrases: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Phrases as tokens, and where there are any."""
    if wrong := [phrase for phrase in phrases if not isinstance(phrase, str | None)]:
        raise ValueError(f"gligen_phrases: phrases are texts, but {wrong[0]!r} is a {type(wrong[0]).__name__}.")
    ids = pipe.tokenizer([phrase or "" for phrase in phrases] + [""] * (OBJECTS - len(phrases)))
    return {"gligen_ids": ids[None], "gligen_phrases": _filled(np.float32([p is not None for p in phrases]))}


def _counting(beta: float) -> dict[str, np.ndarray]:
    """When objects count, as `control.table` reads it."""
    if not 0 <= beta <= 1:
        raise ValueError(f"gligen_scheduled_sampling_beta={beta} is the share of the steps with objects: from 0 to 1.")
    return {"gligen_window": np.float32([[1, 0, beta]])}


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    gligen_phrases: Sequence[str] = (),
    gligen_boxes: Sequence[Box] = (),
    gligen_scheduled_sampling_beta: float = 0.3,
) -> dict[str, Any]:
    """Which objects there are to be, and where.

    Args:
      gligen_phrases: what each object is, the same for all pictures.
      gligen_boxes: where: (left, top, right, bottom) from 0 to 1; as many.
      gligen_scheduled_sampling_beta: the share of the steps, from the first, in which they count.
    """
    boxes = check_boxes(gligen_boxes)
    _same("gligen_phrases", gligen_phrases, boxes)
    arrays = {"gligen_boxes": _filled(boxes), "gligen_masks": _filled(np.ones(len(boxes), np.float32))}
    return arrays | _told(pipe, gligen_phrases) | _counting(gligen_scheduled_sampling_beta)


def prepare_with_pictures(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    gligen_phrases: Sequence[str | None] | None = None,
    gligen_images: Sequence[Any] | None = None,
    gligen_boxes: Sequence[Box] = (),
    input_phrases_mask: int | Sequence[int] = 1,
    input_images_mask: int | Sequence[int] = 1,
    gligen_scheduled_sampling_beta: float = 1.0,
    gligen_normalize_constant: float = LENGTH,
) -> dict[str, Any]:
    """Which objects there are to be, what they look like, and where.

    Args:
      gligen_phrases: what each object is, with None for one that is told by its picture alone.
      gligen_images: Pillow pictures, with None for one that is told by its phrase alone.
      gligen_boxes: where, as many; (0, 1, 0, 1) for a picture whose style is meant.
      input_phrases_mask, input_images_mask: 1 or 0 for all or for each: whether phrases and pictures count.
      gligen_scheduled_sampling_beta: the share of the steps, from the first, in which they count.
      gligen_normalize_constant: length of the features of pictures.
    """
    boxes = check_boxes(gligen_boxes, STYLE)
    phrases = [None] * len(boxes) if gligen_phrases is None else gligen_phrases
    shown = [None] * len(boxes) if gligen_images is None else gligen_images
    _same("gligen_phrases", phrases, boxes), _same("gligen_images", shown, boxes)
    arrays = {"gligen_boxes": _filled(boxes), "gligen_masks": _filled(np.ones(len(boxes), np.float32))}
    arrays |= _told(pipe, phrases) | _counting(gligen_scheduled_sampling_beta)
    arrays["gligen_images"] = _filled(np.float32([image is not None for image in shown]))
    arrays["gligen_length"] = np.float32(gligen_normalize_constant)
    for kind, mask in (("phrases", input_phrases_mask), ("images", input_images_mask)):
        if np.ndim(mask):
            _same(f"input_{kind}_mask", mask, boxes)
        arrays[f"gligen_{kind}"] *= _filled(np.broadcast_to(np.float32(mask), len(boxes)))
    if gligen_images is not None:
        side = pipe.image_encoder.config.image_size
        blank = Image.new("RGB", (side, side))
        arrays["gligen_pixels"] = pictures.clip_pixels([blank if i is None else i for i in shown], side)[None]
    return arrays


def inpaint(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    gligen_boxes: Sequence[Box] = (),
    gligen_inpaint_image: Image.Image | None = None,
) -> dict[str, Any]:
    """The picture to paint objects into, if any, of which the middle is taken.

    Args:
      gligen_inpaint_image: a Pillow picture, for networks that see it beside the sample.
    """
    if gligen_inpaint_image is None:
        check_channels(pipe, 0)
        return {}
    if not isinstance(gligen_inpaint_image, Image.Image) or not len(gligen_boxes):
        raise ValueError(
            "gligen_inpaint_image is a Pillow picture into whose gligen_boxes objects are painted; give both."
        )
    check_channels(pipe, 1 + pipe.vae.config.latent_channels)
    across, down = gligen_inpaint_image.size
    width, height = min(across, down * size.width / size.height), min(down, across * size.height / size.width)
    middle = (across - width) / 2, (down - height) / 2, (across + width) / 2, (down + height) / 2
    image = pictures.to_array(gligen_inpaint_image.crop(middle), size.height, size.width)
    rows, columns = (side // vae_factor(pipe) for side in (size.height, size.width))
    painted = np.zeros((1, rows, columns, 1), np.float32)
    for left, top, right, bottom in np.asarray(gligen_boxes, np.float64):
        painted[:, int(top * rows) : int(bottom * rows), int(left * columns) : int(right * columns)] = 1
    known = 1 - painted
    beside = {"beside_image": image, "beside_gain": known, "beside_spread": np.float32(1), "behind": known}
    return {"image": image, "mask": painted, "mask_noise": np.bool_(True), "from_noise": np.bool_(True), **beside}


# --- on the device ---------------------------------------------------------------------------------------------------


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """As of the family, with what the U-Net makes of the objects; the negative branch knows of none."""
    ids, masks = (jnp.asarray(inputs[name]) for name in ("gligen_ids", "gligen_masks"))
    pooled = networks("text_encoder", ids.reshape(-1, ids.shape[-1])).pooler_output
    features = [(pooled.reshape(*ids.shape[:2], -1), jnp.asarray(inputs["gligen_phrases"]))]
    if "gligen_images" in inputs:
        features.append((_seen(networks, inputs, features[0][0]), jnp.asarray(inputs["gligen_images"])))
    cond = {}
    for branch, told in sd.encode(networks, inputs).items():
        there = float(branch != "negative")
        counted = [(feature, there * mask) for feature, mask in features]
        objects = networks("unet", inputs["gligen_boxes"], there * masks, *counted, method="grounded")
        cond[branch] = {**told, "objects": objects, "weight": control.table(inputs, "gligen")}
    return cond


def _seen(networks: Networks, inputs: Inputs, like: jax.Array) -> jax.Array:
    """The features of pictures, in the place and of the shape of those of phrases [B, 30, D]."""
    if "gligen_pixels" not in inputs:
        return jnp.zeros_like(like)
    pixels = jnp.asarray(inputs["gligen_pixels"])
    embeds = networks("image_encoder", pixels.reshape(-1, *pixels.shape[2:])).image_embeds
    x = networks("image_project", embeds).astype(jnp.float32)
    x = inputs["gligen_length"] * x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    x = x.reshape(*pixels.shape[:2], -1).astype(like.dtype)
    return jnp.pad(x, ((0, 0), (0, OBJECTS - x.shape[1]), (0, 0)))


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What the family makes of times [N], and how much objects count at each."""
    return {"family": sd.times(networks, timesteps, cond), "weight": jnp.swapaxes(cond["weight"], 0, 1)}


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The U-Net's output."""
    weight = lambda keys: jnp.broadcast_to(t["weight"][:, None], keys.shape[:2])
    objects = tuple((keys, values, weight(keys)) for keys, values in cond["objects"])
    return sd.predict(networks, x, t["family"], {**cond, "objects": objects})


class StableDiffusionGLIGENPipeline(DiffusionPipeline):
    """Text to image with objects in boxes, told by phrases."""

    family = sd.STABLE_DIFFUSION._replace(encode=encode, times=times, predict=predict)
    extras = (prepare, inpaint)


class StableDiffusionGLIGENTextImagePipeline(StableDiffusionGLIGENPipeline):
    """Text to image with objects in boxes, told by phrases, by pictures or by both."""

    extras = (prepare_with_pictures, inpaint)
    reads = ("image_encoder",)
