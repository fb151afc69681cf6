"""Textual inversion and Custom Diffusion: words and weights learned elsewhere mean here what they mean in PyTorch."""

import copy

import jax
import numpy as np
import peers
import pytest
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.numpy import save_file
from test_pipelines import load as load_pair

import flaxdiff
from flaxdiff.adapters.textual_inversion import TABLE

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)


def load(build):
    """A pipeline here and there; its tokenizers, which the tests share, are copies, for they will learn words."""
    pipe, params, peer = load_pair(build)
    for name, _ in pipe.tokenizers:
        setattr(peer, name, copy.deepcopy(getattr(peer, name)))
    return pipe, params, peer


def encoded(pipe, params, encoder, text):
    """The last hidden states of a text."""
    tokenizer = dict(pipe.tokenizers)[encoder.replace("text_encoder", "tokenizer")]
    spec = dict(pipe.specs)[encoder]
    return flaxdiff.apply(spec, params[encoder], tokenizer(text)).last_hidden_state


def peer_encoded(peer, encoder, text):
    tokenizer = getattr(peer, encoder.replace("text_encoder", "tokenizer"))
    text = peer.maybe_convert_prompt(text, tokenizer)
    ids = tokenizer(text, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return getattr(peer, encoder)(ids).last_hidden_state.numpy()


FILES = {
    "diffusers.safetensors": lambda v, path: save_file({"<cat>": v}, path),
    "diffusers.bin": lambda v, path: torch.save({"<cat>": torch.tensor(v[0])}, path),  # one vector, without an axis
    "a1111.pt": lambda v, path: torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.tensor(v)}, "name": "<cat>", "step": 9}, path
    ),
    "<cat>.safetensors": lambda v, path: save_file({"emb_params": v}, path),
}


@pytest.mark.parametrize("name", FILES)
def test_formats(name, tmp_path):
    """The encoder makes of texts with the word what PyTorch's makes."""
    pipe, params, peer = load(peers.stable_diffusion_1)
    vectors = normal(3, 16)
    FILES[name](vectors, tmp_path / name)
    more, extended = flaxdiff.load_textual_inversion(pipe, params, tmp_path / name)
    peer.load_textual_inversion(str(tmp_path / name), token="<cat>")
    texts = ["a <cat> red", "<cat>", "red dog", "red <cat>, <cat>" + " dog" * 20]
    with pytest.warns(UserWarning, match="Only the first 14 tokens"):
        ours = encoded(more, extended, "text_encoder", texts)
    assert peers.relative(ours, peer_encoded(peer, "text_encoder", texts)) < 1e-4
    assert pipe.tokenizer != more.tokenizer and hash(more) is not None
    assert encoded(pipe, params, "text_encoder", texts[2:3]).shape == (1, 16, 16)  # what was stays as it was
    assert len(extended["text_encoder"][TABLE]) == len(params["text_encoder"][TABLE]) + (
        1 if name.endswith("bin") else 3
    )


def test_two_encoders_and_two_words(tmp_path):
    """SDXL: a vector of each width to each encoder; another word after it; a word in the negative prompt."""
    pipe, params, peer = load(peers.stable_diffusion_xl)
    vectors = {"clip_l": normal(2, 16), "clip_g": normal(2, 16)}
    save_file(vectors, tmp_path / "style.safetensors")
    save_file({"<Dog>": normal(1, 16)}, tmp_path / "dog.safetensors")
    more, extended = flaxdiff.load_textual_inversion(pipe, params, tmp_path / "style.safetensors", token="<s>")
    more, extended = flaxdiff.load_textual_inversion(more, extended, tmp_path / "dog.safetensors")
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = getattr(peer, f"text_encoder{suffix}"), getattr(peer, f"tokenizer{suffix}")
        words = {"<s>": torch.tensor(vectors[key])}
        peer.load_textual_inversion(words, token="<s>", text_encoder=parts[0], tokenizer=parts[1])
        ours = encoded(more, extended, f"text_encoder{suffix}", ["red <s> dog"])
        assert peers.relative(ours, peer_encoded(peer, f"text_encoder{suffix}", ["red <s> dog"])) < 1e-4
    ids = [tokenizer(["<dog> <S>"])[0, 1:4].tolist() for _, tokenizer in more.tokenizers]
    table = len(params["text_encoder"][TABLE])
    assert ids[0] == [table + 2, table, table + 1] and ids[1][-1] < table
    inputs = more.prepare_inputs(prompt="red", negative_prompt="<s>")
    assert table in inputs["negative_prompt_ids"] and table not in inputs["prompt_ids"]
    flaxdiff.save(tmp_path / "saved", more, extended)
    assert flaxdiff.load(str(tmp_path / "saved"))[0].text_encoder.config.vocab_size == table + 3


def test_what_is_no_word(tmp_path):
    pipe, params, _ = load(peers.stable_diffusion_1)
    save_file({"<cat>": normal(2, 99)}, tmp_path / "wide.safetensors")
    save_file({"<cat>": normal(2, 16)}, tmp_path / "cat.safetensors")
    save_file({"a": normal(2, 16), "b": normal(2, 16)}, tmp_path / "two.safetensors")
    save_file({"<cat>": np.inf * normal(2, 16)}, tmp_path / "inf.safetensors")
    for name, fault in (("wide", "learned with another model"), ("two", "no textual inversion"), ("inf", "infinities")):
        with pytest.raises(ValueError, match=fault):
            flaxdiff.load_textual_inversion(pipe, params, tmp_path / f"{name}.safetensors")
    more, extended = flaxdiff.load_textual_inversion(pipe, params, tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match="knows '<cat>' already"):
        flaxdiff.load_textual_inversion(more, extended, tmp_path / "cat.safetensors")
    with pytest.raises(FileNotFoundError, match="learned_embeds"):
        flaxdiff.load_textual_inversion(pipe, params, tmp_path)


def test_custom_diffusion(tmp_path):
    """Keys and values, and queries and outputs, of the attentions to the text, as diffusers writes and uses them."""
    pipe, params, peer = load(peers.stable_diffusion_1)
    torch.manual_seed(0)
    processors = {}
    for name in peer.unet.attn_processors:
        attention = peer.unet.get_submodule(name.removesuffix(".processor"))
        learned = "attn2" in name
        processors[name] = CustomDiffusionAttnProcessor(
            learned, learned and "mid" in name, attention.to_q.in_features, attention.to_k.in_features
        )
    peer.unet.set_attn_processor(processors)
    peer.unet.save_attn_procs(str(tmp_path), safe_serialization=False)
    changed = flaxdiff.load_custom_diffusion(pipe, params, tmp_path)
    x, text = normal(1, 8, 8, 4), normal(1, 5, 16)
    run = jax.jit(lambda own: flaxdiff.apply(pipe.unet, own, x, 3.0, text))
    with torch.no_grad():
        theirs = peer.unet(peers.nchw(x), 3, torch.tensor(text)).sample
    assert peers.relative(run(changed["unet"]), peers.nhwc(theirs)) < 1e-4
    assert peers.relative(run(params["unet"]), peers.nhwc(theirs)) > 1e-2
    torch.save({"conv_in.weight": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"conv_in.weight \[2\]"):
        flaxdiff.load_custom_diffusion(pipe, params, tmp_path / "other.bin")
