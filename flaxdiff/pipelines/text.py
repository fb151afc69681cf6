"""Prompts on the host: texts to token ids. Tokenizers are transformers', imported when a prompt first needs one.

CLIP's plain files (a vocabulary and its merges) are read by the tokenizers library alone: transformers takes half a
second to import. T5's are `tokenizer.json`, or where there is none SentencePiece's, see spiece.py; a language model's
are `tokenizer.json`.
"""

import functools
import itertools
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxdiff.checkpoint import files
from flaxdiff.pipelines import spiece

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline


PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # CLIP's words, before they are made of tokens


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

    def __call__(self, texts: Sequence[str], length: int | None = None) -> np.ndarray:
        """The ids of texts; `length`: of a text encoder that reads other than the tokenizer's own."""
        own = self.class_name.removesuffix("Fast") == "CLIPTokenizer" and length is None
        plain = _clip(self.folder) if own else None
        if plain is not None:
            read = plain.encode_batch(list(texts))
            length, ids, cut = (
                plain.truncation["max_length"],
                [r.ids for r in read],
                [bool(r.overflowing) for r in read],
            )
        else:
            length = length or self.loaded.model_max_length
            ids = self.loaded(list(texts), padding="max_length", max_length=length, truncation=True)["input_ids"]
            cut = [len(whole) > length for whole in self.loaded(list(texts), verbose=False)["input_ids"]]
        for text in itertools.compress(texts, cut):
            warnings.warn(
                f"The prompt is longer than {length} tokens; its end is not read: …{text[-40:]!r}", stacklevel=2
            )
        return np.asarray(ids, np.int32)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self.loaded.save_pretrained(folder)


@functools.cache
def _load(folder: str, class_name: str) -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is as it should be
    import transformers

    if class_name.removesuffix("Fast") == "T5Tokenizer" and not (Path(folder) / "tokenizer.json").is_file():
        return spiece.t5_tokenizer(Path(folder))
    if not any((Path(folder) / file).is_file() for file in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise FileNotFoundError(f"{folder} has no tokenizer.json; save it by transformers' save_pretrained once more.")
    return getattr(transformers, class_name).from_pretrained(folder)


@functools.cache
def _clip(folder: str) -> Any:
    """CLIP's tokenizer as transformers builds it, without importing all of that; None if its files say more than these.

    The text, normalised, is split into words, each as bytes, whose pairs are merged in the order of `merges.txt`.
    """
    root = Path(folder)
    if {path.name for path in root.iterdir()} != {"vocab.json", "merges.txt", "tokenizer_config.json"}:
        return None
    config, vocab = files.read_json(root / "tokenizer_config.json"), files.read_json(root / "vocab.json")
    start, end, unknown, pad = special = [config.get(f"{token}_token") for token in ("bos", "eos", "unk", "pad")]
    length = config.get("model_max_length")
    if not all(isinstance(token, str) and token in vocab for token in special) or "added_tokens_decoder" in config:
        return None
    if not isinstance(length, int) or not 2 < length < 1 << 20:
        return None

    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    lines = (root / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    made = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex("|".join([re.escape(start), re.escape(end), PIECES]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.add_special_tokens(special)
    made.post_processor = processors.RobertaProcessing((end, vocab[end]), (start, vocab[start]), False, False)
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=vocab[pad], pad_token=pad)
    return made


def texts(prompt: str | Sequence[str] | None) -> list[str]:
    """One text or several, as a list; None is the empty text."""
    return [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)


def further(pipe: "DiffusionPipeline", name: str, prompts: str | Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays for branches of their own, `name_00`, `name_01`, …, one for each of these texts, for all pictures alike.

    Raises:
      ValueError: there are none, or more than can be told apart.
    """
    words = texts(prompts)
    if not 1 <= len(words) <= 99:
        raise ValueError(f"{name}: give between 1 and 99 texts, not {len(words)}.")
    return {
        f"{name}_{i:02d}_{tokenizer.replace('tokenizer', 'prompt_ids')}": ids([text])
        for i, text in enumerate(words)
        for tokenizer, ids in pipe.tokenizers
    }


def words(ids: np.ndarray) -> int:
    """How many tokens of a text [N] are of its words: the start comes before them, and the first end after.

    >>> words(np.array([7, 1, 2, 3, 9, 9, 9]))
    3
    """
    return int(np.argmax(ids == ids.max())) - 1


def branches(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Branch -> what the names of its arrays begin with: of all whose tokens or embeddings are among the inputs.

    >>> branches({"prompt_ids": 0, "negative_prompt_ids": 0, "edit_00_prompt_ids": 0, "pooled_prompt_embeds": 0})
    {'positive': '', 'negative': 'negative_', 'edit_00': 'edit_00_'}
    """
    found = [re.fullmatch(r"(|\w+_)prompt_(?:ids|embeds)(?:_2)?", name) for name in inputs]
    prefixes = dict.fromkeys(match[1] for match in found if match and not match[1].endswith("pooled_"))
    return {prefix[:-1] or "positive": prefix for prefix in prefixes}


def check_together(**given: Any) -> None:
    """Raise ValueError where one of some options is given and another is not."""
    if len({value is None for value in given.values()}) > 1:
        raise ValueError(f"{' and '.join(given)} go together; give both.")


def check_prompts(
    pipe: "DiffusionPipeline", prompt: str | Sequence[str] | None, embeds: Any, other: str = "prompt_embeds"
) -> str | Sequence[str]:
    """The prompt, once it is clear that there is just one source of it, or the `other`. Raises ValueError otherwise."""
    name = type(pipe).__name__
    if (prompt is None) == (embeds is None):
        given = "neither" if prompt is None else "both"
        raise ValueError(f"{name} needs a prompt or {other}, and was given {given}; give one of them.")
    if prompt is not None and not isinstance(prompt, str):
        if not len(prompt):
            raise ValueError(f"{name} was given an empty list of prompts; give at least one text.")
        if wrong := [p for p in prompt if not isinstance(p, str)]:
            raise ValueError(f"{name}: prompts are texts, but {wrong[0]!r} is a {type(wrong[0]).__name__}.")
    return prompt
