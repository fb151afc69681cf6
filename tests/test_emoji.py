"""The emoji: the same data everywhere and always, captions by the rules, figures that measure what they say."""

import json
import runpy
import zlib
from pathlib import Path

import numpy as np
import pytest

from flaxdiff.training import emoji, evaluate, tokenizer

font = pytest.mark.skipif(not emoji.FONT.exists(), reason=f"{emoji.FONT} is not installed")


@font
def test_all_emoji_and_only_those_that_every_python_names():
    names, rgba = emoji.load()
    assert len(names) == len(set(names)) == 1386 and rgba.shape == (1386, 64, 64, 4)
    assert {"dog face", "slice of pizza", "grinning face"} <= set(names) and "shaking face" not in names
    assert all(name == name.lower() for name in names)
    assert (rgba[..., 3].max((1, 2)) > 200).all(), "a picture is empty"


@font
def test_batches_are_a_function_of_seed_and_step():
    names = emoji.load().names
    a, b = (emoji.batch(names, 32, 5, 100) for _ in range(2))
    assert a.captions == b.captions and (a.emoji == b.emoji).all() and (a.background == b.background).all()
    assert emoji.batch(names, 32, 5, 101).captions != a.captions != emoji.batch(names, 32, 6, 100).captions
    one_pass = np.concatenate([emoji.batch(names, 66, 0, n).emoji for n in range(21)])
    assert sorted(one_pass) == list(range(1386)), "a pass shows every emoji once"


@font
def test_held_out_pairs_never_appear():
    names = emoji.load().names
    colours = list(emoji.BACKGROUNDS)
    shown = set()
    for n in range(60):
        batch = emoji.batch(names, 66, 0, n, composed=0.9)
        shown |= {(names[e], colours[b]) for e, b in zip(batch.emoji, batch.background) if b}
        for b, caption in zip(batch.background, batch.captions):
            assert colours[b] in caption if b else not any(f"on {c}" in caption for c in emoji.COLOURS)
    assert len(shown) > 2000
    assert not [pair for pair in shown if zlib.crc32(f"{pair[0]} on {pair[1]}".encode()) % 4 == 0]


def test_over_blends():
    rgba = np.array([[[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]]], np.uint8)
    seen = emoji.over(rgba, np.array([255, 255, 255]))[0, 0]
    np.testing.assert_allclose(seen, [[1, -1, -1], [1, 1, 1], [0.6, 0.6, 0.6]], atol=1e-6)


def test_tokenizer_knows_every_word_and_any_other(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer.train(["dog face", "dog on blue"] * 5, 540, 16, tmp_path)
    tok = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == len(tok) <= 540
    assert tok.tokenize("Dog FACE") == ["dog</w>", "face</w>"]
    ids = tok(["dog", "über-flurb 7"], padding="max_length", truncation=True)["input_ids"]
    assert all(len(row) == 16 and row[0] == tok.bos_token_id and row[-1] == tok.eos_token_id for row in ids)
    assert tok.decode(ids[1], skip_special_tokens=True).replace(" ", "") == "über-flurb7"


@font
def test_figures_of_a_perfect_and_of_a_useless_painter():
    names, rgba = emoji.load()
    pairs = [pair for pair in evaluate.held_out_pairs(names) if pair[1] == "blue"][:40]
    assert all(emoji.held_out(names[i], colour) for i, colour in pairs)

    def perfect(captions):
        where = {emoji.caption(names[i], c): (i, c) for i, c in [*((i, "white") for i in range(50)), *pairs]}
        found = [where[caption] for caption in captions]
        return np.stack([emoji.over(rgba[i], np.array(emoji.BACKGROUNDS[c])) for i, c in found]) + np.float32(0.01)

    blank = lambda captions: np.ones((len(captions), 64, 64, 3), np.float32)
    white = evaluate.on_white(perfect, range(50))
    assert white["R@1"] == 1 and abs(white["PSNR"] - 46.02) < 0.01
    assert evaluate.on_held_out(perfect, pairs) == {"pairs": 40, "background": 1, "emoji": 1}
    assert evaluate.on_white(blank, range(50))["R@1"] <= 0.02
    assert evaluate.on_held_out(blank, pairs)["background"] == 0


def test_embeddings_begin_as_what_the_pictures_of_a_token_have_in_common():
    """Names that look alike get like embeddings; a token of two names lies between; others stay as they were."""
    in_common = runpy.run_path(str(Path(__file__).parent.parent / "train/train_text_encoder.py"))["in_common"]
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (4, 16, 16, 3)).repeat(4, 1).repeat(4, 2)[[0, 0, 1, 2, 3]]
    rgba = np.concatenate([pictures, np.full((5, 64, 64, 1), 255)], -1).astype(np.uint8)
    table = rng.standard_normal((10, 3)).astype(np.float32)
    every, unused = 9, [0, 8]
    ids = [[every, 1], [every, 2], [every, 3], [every, 4], [every, 5], [6, 6], [7, 7], [6, 6], [7, 7], [7, 7]]
    made = np.asarray(in_common(rgba, np.array(ids), table))
    np.testing.assert_array_equal(made[[every, *unused]], table[[every, *unused]])
    unit = made / np.linalg.norm(made, axis=1, keepdims=True)
    like = unit @ unit.T
    assert like[1, 2] > 0.999 and max(like[1, 3], like[1, 4], like[3, 4]) < 0.5
    between = np.linalg.lstsq(unit[[1, 3]].T, unit[6])  # 6 is in the names of two pictures
    assert (between[0] > 0.1).all() and between[1] < 1e-9 and like[6, 4] < 0
    np.testing.assert_allclose(np.linalg.norm(made[1:8], axis=1), 3**0.5, rtol=0.05)  # one loudness
