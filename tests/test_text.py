"""Tokenizers: CLIP's plain files, read without transformers, and those of language models give the same ids."""

import json
import random
import shutil
import string
import subprocess
import sys

import numpy as np
import pytest
import transformers

import flaxdiff
from flaxdiff import registry
from flaxdiff.checkpoint import pipelines
from flaxdiff.pipelines import text

TEXTS = [
    "dog face on blue",
    "",
    "  Hello,   WORLD!! it's 1234 o'clock\n\tnew",
    "naïve café ﬁ Ⅳ 日本語 🐶 e\u0301",
    "<|endoftext|> a <|startoftext|>b<|EndOfText|>c",
    "don't we'll they've I'm he'd under_score a-b c.d/e",
    "\u00a0nbsp\u200bzw",
    "x" * 300,
]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(flaxdiff.EMOJI / "tokenizer", tmp_path / "tokenizer")


def theirs(tokenizer: text.Tokenizer, texts: list[str]) -> np.ndarray:
    length = tokenizer.loaded.model_max_length
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "np"}
    return tokenizer.loaded(texts, **options)["input_ids"]


@pytest.mark.filterwarnings("ignore:The prompt is longer")
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_same_ids(pad, folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": pad}))
    tokenizer = text.Tokenizer(str(folder), "CLIPTokenizer")
    assert text._clip(str(folder)) is not None
    draw = random.Random(0)
    letters = string.printable + "éßΩж中🐱\u0301\u200d½²"
    texts = TEXTS + ["".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(300)]
    assert np.array_equal(tokenizer(texts), theirs(tokenizer, texts))


def test_what_is_cut_is_said(folder):
    with pytest.warns(UserWarning, match="longer than 32 tokens; its end is not read: ….*the end"):
        text.Tokenizer(str(folder), "CLIPTokenizer")(["red", "word " * 40 + "the end"])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<new>": 3072}),
        ("tokenizer_config.json", {"bos_token": {"content": "<|startoftext|>", "lstrip": True}}),
        ("tokenizer_config.json", {"model_max_length": 1e30}),
        ("tokenizer_config.json", {"pad_token": "<pad>"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3072": {"content": "<new>"}}}),
    ],
)
def test_transformers_reads_the_rest(file, content, folder):
    """Whatever the plain files do not say is left to transformers."""
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))
    assert text._clip(str(folder)) is None


def test_transformers_is_not_imported():
    code = "import sys, flaxdiff; flaxdiff.load()[0].prepare_inputs(prompt='cat'); print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.filterwarnings("ignore:The prompt is longer")
@pytest.mark.parametrize("name", ["GemmaTokenizerFast", "LlamaTokenizerFast", "Qwen2TokenizerFast"])
def test_of_language_models(name, tmp_path):
    """A component of a checkpoint, of which the texts go in as in transformers, cut and filled up on its own side."""
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "<eos>",
        "<bos>",
        "<s>",
        "<|endoftext|>",
        *map(chr, range(33, 127)),
        "\u2581",
        "\u0120",
    ]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    made = getattr(transformers, name)(vocab=vocab, merges=[], pad_token="<pad>", padding_side="left")
    made.save_pretrained(tmp_path / "tokenizer")
    assert registry.sort_of(name, "model", "tokenizer") == "tokenizer"
    ours = pipelines.read_tokenizer(tmp_path / "tokenizer", name)
    given = TEXTS[:3]
    wanted = made(given, padding="max_length", max_length=9, truncation=True)["input_ids"]
    np.testing.assert_array_equal(ours(given, 9), wanted)
    assert len(np.unique(ours(given, 9))) > 8
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        text._load.__wrapped__(str(tmp_path / "tokenizer"), name)
