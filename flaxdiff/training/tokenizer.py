"""Tokenizers learned from captions: one in CLIP's file format, and one of whole words in T5's manner.

CLIP splits lower-cased text into words, digits and runs of punctuation, writes each as bytes, and merges pairs of
symbols in the order in which they were learned; the last symbol of a word carries `</w>`. All 512 single bytes are in
the vocabulary, so a word never seen still has tokens. The text begins with <|startoftext|>, ends with <|endoftext|>
and is padded with that.

Whole words, and names of several, suit a small encoder that reads few of them: none has to be spelled. Other words are
read as letters.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from flaxdiff.pipelines.text import PIECES

START, END = "<|startoftext|>", "<|endoftext|>"


def train(captions: Iterable[str], vocab_size: int, max_length: int, folder: str | Path) -> None:
    """Learn the merges and write `vocab.json`, `merges.txt` and `tokenizer_config.json`.

    Args:
      captions: the text to learn from; a frequent caption counts as often as it is given.
      vocab_size: tokens in all: 512 bytes, merges, two special ones.
      max_length: the length that texts are padded to.
      folder: where the files go; made if it does not exist.
    """
    byte = pre_tokenizers.ByteLevel.alphabet()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # The learner's own vocabulary lacks word ends that it did not see; only its merges are kept.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    symbols = [*sorted(byte), *(b + "</w>" for b in sorted(byte))]
    merges = merges[: vocab_size - len(symbols) - 2]
    words = list(dict.fromkeys([*symbols, *(a + b for a, b in merges)]))
    vocab = {word: i for i, word in enumerate([*words, START, END])}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train_words(
    captions: Iterable[str], phrases: Iterable[str], max_length: int, marks: int, folder: str | Path
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` of a tokenizer that knows every word of the captions.

    A text is `<mark_0> … words </s>`, padded with `<pad>`. The marks are the same in every text: places for an encoder
    that reads both ways to say something at. Phrases are tokens too, after all the words: without them the rest of the
    vocabulary is the same.

    Args:
      captions: the text whose words are known.
      phrases: words that are read as one, up to a comma or the like; hyphens are words.
      max_length: the length that texts are padded to.
      marks: how many marks come before the words.
      folder: where the files go; made if it does not exist.

    >>> import tempfile, transformers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train_words(["red dog", "dog-face, yo-yo"], ["dog-face"], 6, 1, folder)
    ...     transformers.PreTrainedTokenizerFast.from_pretrained(folder).tokenize("Red  dog-face , yo-god")
    ['▁red', '▁dog▁-▁face', '▁,', '▁yo', '▁-', '▁', 'g', 'o', 'd']
    """
    words = sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption.lower())})
    runs = {run.strip() for phrase in phrases for run in re.split(r"[^\w\s-]", phrase.lower().replace("-", " - "))}
    pieces = ["▁" + run.replace(" ", "▁") for run in words + sorted(run for run in runs if " " in run)]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz0123456789").union(*words))
    special = ["<pad>", "</s>", "<unk>", *(f"<mark_{i}>" for i in range(marks))]
    scores = {token: 0.0 for token in special} | {letter: -10.0 for letter in letters}
    learned = Tokenizer(models.Unigram([*scores.items(), *((piece, -1.0) for piece in pieces)], unk_id=2))
    learned.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("-", " - "),
            normalizers.Replace(Regex(r"\s+(?=[^\w\s-])"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[^\w\s-]"), "isolated"), pre_tokenizers.Metaspace(split=False)]
    )
    learned.add_special_tokens(special)
    learned.post_processor = processors.TemplateProcessing(
        single=" ".join([*special[3:], "$A", "</s>"]), special_tokens=[(t, i) for i, t in enumerate(special) if i != 2]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    learned.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
