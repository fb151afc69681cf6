"""Prompts with weights, blends and any length: as compel makes them of PyTorch's text encoders."""

import compel
import jax
import numpy as np
import peers
import pytest
import torch
from compel import embeddings_provider

import flaxdiff
from flaxdiff.pipelines.prompts import Fragment, parse

KEY = jax.random.key(0)
PROMPTS = [
    "a red cat",
    "a cat++ on red",
    "(a cat)1.3 on red-",
    "(a red)0.6 cat in b--",
    "a (red (c d)1.5 e)0.8 f",
    '("a red cat", "b d++").blend(0.7, 0.8)',
    '("a red", "cat", "d e").and()',
    '("a red", "cat+").and(1, 0.5)',
    "",
]


@pytest.fixture(scope="module")
def one():
    peer = peers.stable_diffusion_1()
    peer.text_encoder = peers.lively(peer.text_encoder)
    build = lambda: peer
    return *flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(build)), peer


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_encoder(prompt, one):
    pipe, params, peer = one
    theirs = compel.Compel(tokenizer=peer.tokenizer, text_encoder=peer.text_encoder, truncate_long_prompts=False)
    with torch.no_grad():
        wanted = theirs(prompt)
    ours = flaxdiff.encode_prompts(pipe, params, prompt)
    assert peers.relative(ours["prompt_embeds"], wanted) < 1e-4
    assert ours["negative_prompt_embeds"].shape == wanted.shape
    assert sorted(ours) == ["negative_prompt_embeds", "prompt_embeds"]


def test_two_encoders():
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(peers.stable_diffusion_xl))
    peer = peers.stable_diffusion_xl()
    theirs = compel.Compel(
        tokenizer=[peer.tokenizer, peer.tokenizer_2],
        text_encoder=[peer.text_encoder, peer.text_encoder_2],
        returned_embeddings_type=embeddings_provider.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=[False, True],
    )
    with torch.no_grad():
        wanted = theirs("a cat++ on (red)0.5")[0]
        plain, pooled = theirs("a cat on red")
    ours = flaxdiff.encode_prompts(pipe, params, ["a cat++ on (red)0.5", "a cat on red"], "b")
    assert peers.relative(ours["prompt_embeds"], np.concatenate([wanted, plain])) < 1e-4
    assert peers.relative(ours["pooled_prompt_embeds"][1:], pooled) < 1e-4
    pictures = pipe.replace(progress=False)(params, KEY, **ours, num_inference_steps=2, output_type="np").images
    assert pictures.shape[0] == 2


def test_long_prompts(one):
    """Pieces between words, each read on its own, side by side; the negative prompt is filled up with empty texts."""
    pipe, params, _ = one
    words = [f"red {c}" for c in "abcdefghi"]
    ours = flaxdiff.encode_prompts(pipe, params, " ".join(words), "x")
    first, second = (
        flaxdiff.encode_prompts(pipe, params, " ".join(w))["prompt_embeds"] for w in (words[:7], words[7:])
    )
    np.testing.assert_allclose(ours["prompt_embeds"], np.concatenate([first, second], 1), atol=1e-5)
    empty = flaxdiff.encode_prompts(pipe, params, "")["prompt_embeds"]
    np.testing.assert_allclose(ours["negative_prompt_embeds"][:, 16:], empty, atol=1e-5)
    call = pipe.replace(progress=False)(params, KEY, **ours, num_inference_steps=2, output_type="np")
    assert call.images.shape == (1, 16, 16, 3)


def test_embeddings_without_weights_are_the_prompts(one):
    pipe, params, _ = one
    pipe, options = pipe.replace(progress=False), dict(num_inference_steps=2, output_type="np")
    embeds = flaxdiff.encode_prompts(pipe, params, "a cat", "b")
    plain = pipe(params, KEY, prompt="a cat", negative_prompt="b", **options).images
    np.testing.assert_allclose(pipe(params, KEY, **embeds, **options).images, plain, atol=1e-5)


def test_signs():
    of = lambda text: [(f.text, f.weight) for f in parse(text).prompts[0]]
    assert of(r"a \(cat\) c\+\+") == [("a (cat) c++", 1.0)]
    assert of("well-known x - y") == [("well-known x - y", 1.0)]
    assert of("at 10:30 (a cat: 1.3)") == [("at 10:30", 1.0), ("a cat", 1.3)]
    assert of('"a cat"++ b') == [("a cat", 1.21), ("b", 1.0)]
    assert parse('["a", "b"].and()').prompts == ((Fragment("a", 1.0),), (Fragment("b", 1.0),))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (cat", r"\( at 2 is never closed"),
        ("a cat)", r"\) at 5 closes nothing"),
        ('a "cat', "at 2 is never closed"),
        ("(cat:big)", "'big' is no weight"),
        ("(cat:1.2.3)", "'1.2.3' is no weight"),
        ('("a", "b").blend(0.5)', "1 weights for 2 prompts"),
        ('("a", "b").blend(x, 1)', "takes numbers"),
        ('("a", b).and()', "double quotes"),
        ('("a", "b").blend(1, -1)', "add up to nothing"),
        ('("a", "b").blend(nan, 1)', "2 weights for 2 prompts|numbers"),
    ],
)
def test_what_does_not_parse(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse(prompt)
