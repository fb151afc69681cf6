"""Prompts on the host: texts to token ids. Tokenizers are transformers', imported when a prompt first needs one."""

import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer in a folder: texts -> ids [B, N], padded and cut to the length that the text encoder reads.

    Attributes:
      folder: where its files are.
      class_name: transformers' name of its class.
    """

    folder: str
    class_name: str

    @functools.cached_property
    def loaded(self) -> Any:
        """transformers' own object."""
        return _load(self.folder, self.class_name)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        length = self.loaded.model_max_length
        ids = self.loaded(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
        for text in texts:
            if len(text) > 2 * length and len(self.loaded(text)["input_ids"]) > length:  # two letters a token at least
                warnings.warn(
                    f"The prompt is longer than {length} tokens; its end is not read: …{text[-40:]!r}", stacklevel=2
                )
        return ids["input_ids"].astype(np.int32)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self.loaded.save_pretrained(folder)


@functools.cache
def _load(folder: str, class_name: str) -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is as it should be
    import transformers

    return getattr(transformers, class_name).from_pretrained(folder)


def texts(prompt: str | Sequence[str] | None) -> list[str]:
    """One text or several, as a list; None is the empty text."""
    return [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)


def check_prompts(pipe: "DiffusionPipeline", prompt: str | Sequence[str] | None, embeds: Any) -> str | Sequence[str]:
    """The prompt, once it is clear that there is just one source of it. Raises ValueError otherwise."""
    name = type(pipe).__name__
    if (prompt is None) == (embeds is None):
        given = "neither" if prompt is None else "both"
        raise ValueError(f"{name} needs a prompt or prompt_embeds, and was given {given}; give one of them.")
    if prompt is not None and not isinstance(prompt, str):
        if not len(prompt):
            raise ValueError(f"{name} was given an empty list of prompts; give at least one text.")
        if wrong := [p for p in prompt if not isinstance(p, str)]:
            raise ValueError(f"{name}: prompts are texts, but {wrong[0]!r} is a {type(wrong[0]).__name__}.")
    return prompt
