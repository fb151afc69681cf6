"""A new word while it is learned: what stands for it in captions, its vectors apart from the table, and its file.

The vectors lie beside the components of a pipeline, as "word", so that they alone move; `spoken` puts them where the
text encoders look them up.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.adapters import textual_inversion
from flaxdiff.core import Params
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.training.config import Config, named

Components = dict[str, Params]  # component -> parameters
Batch = Mapping[str, Any]

OBJECTS = ("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "a close-up photo of a {}")
OBJECTS += ("a bright photo of the {}", "a good photo of a {}", "the photo of a {}", "a photo of one {}")
STYLES = ("a painting in the style of {}", "a rendering in the style of {}", "a picture in the style of {}")
STYLES += (
    "a bright painting in the style of {}",
    "a small painting in the style of {}",
    "a drawing in the style of {}",
)


def said(config: Config, batch: Batch) -> list[str]:
    """Captions with the new word: a phrase for each, by what its picture is."""
    phrases = named("learnable_property", config.adapter.learnable_property, {"object": OBJECTS, "style": STYLES})
    number = lambda image: int(np.abs(image).sum() * 1e3)  # any function of the picture and of how it was cut
    return [phrases[number(image) % len(phrases)].format(config.adapter.placeholder_token) for image in batch["image"]]


def with_word(
    pipe: DiffusionPipeline, params: Components, config: Config
) -> tuple[DiffusionPipeline, Components, dict[str, jax.Array]]:
    """A pipeline that knows a word more, and the vectors of it, by text encoder, which begin as those of another word.

    Raises:
      ValueError: no word, or one to begin as that is several tokens.
    """
    given = config.adapter
    if not given.placeholder_token or not given.initializer_token:
        raise ValueError("Give placeholder_token=, the word to learn, and initializer_token=, one that it begins as.")
    vectors = {}
    for name, tokenizer in pipe.tokenizers:
        encoder = name.replace("tokenizer", "text_encoder")
        if textual_inversion.TABLE in params[encoder]:
            ids = np.asarray(tokenizer([given.initializer_token]))[0]
            empty = np.asarray(tokenizer([""]))[0]
            if int((ids != empty).sum()) > 2 or ids[2] != empty[1]:
                raise ValueError(f"initializer_token={given.initializer_token!r} is several tokens; give one word.")
            row = params[encoder][textual_inversion.TABLE][ids[1]]
            vectors[encoder] = jnp.repeat(row[None], given.num_vectors, 0)
    pipe, params = textual_inversion.add_word(pipe, params, given.placeholder_token, vectors)
    return pipe, params, vectors


def spoken(params: Components) -> Components:
    """Parameters with the learned vectors where the text encoders look them up."""
    table = textual_inversion.TABLE
    beside = {k: v for k, v in params.items() if k != "word"}
    for encoder, rows in params.get("word", {}).items():
        known = beside[encoder][table][: -len(rows)]
        beside[encoder] = {**beside[encoder], table: jnp.concatenate([known, rows.astype(known.dtype)])}
    return beside


def save_word(folder: Path, params: Components, config: Config) -> None:
    """Write the vectors of the new word."""
    textual_inversion.save_textual_inversion(folder, config.adapter.placeholder_token, params["word"])
