"""UniDiffuser in all its modes against PyTorch's pipeline, with the same noise in the halves that are not known."""

import functools
import json
import tempfile
from pathlib import Path

import diffusers
import jax
import numpy as np
import peers
import pytest
import test_classic
import torch
import transformers
from diffusers.pipelines.deprecated.unidiffuser import pipeline_unidiffuser
from PIL import Image

import flaxdiff
from flaxdiff.pipelines import unidiffuser

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY, SIDE, PIXELS, STEPS = jax.random.key(0), 8, 8 * 8 * 4, 3
NOISE = {"vae_latents": normal(1, SIDE, SIDE, 4), "clip_latents": normal(1, 1, 20), "prompt_latents": normal(1, 16, 16)}
PICTURE = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))


@functools.cache
def words() -> transformers.GPT2Tokenizer:
    """GPT-2's tokenizer with letters for words, and an end."""
    folder = Path(tempfile.mkdtemp())
    vocab = [chr(97 + i) for i in range(26)] + [str(i) for i in range(10)] + ["Ġ", "!", "<|endoftext|>", "?"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@functools.cache
def unidiffuser_pipeline():
    return diffusers.UniDiffuserPipeline(
        vae=peers.sure(peers.vae()),
        text_encoder=peers.text_encoder(),
        image_encoder=peers.image_encoder(),
        clip_image_processor=transformers.CLIPImageProcessor(size=32, crop_size=32),
        clip_tokenizer=peers.tokenizer(),
        text_decoder=test_classic.text_decoder(),
        text_tokenizer=words(),
        unet=test_classic.unidiffuser_model(use_data_type_embedding=True),
        scheduler=diffusers.DPMSolverMultistepScheduler(**peers.SD_BETAS),
    )


load = functools.cache(test_classic.load)


def unknown(mode: str) -> list[torch.Tensor]:
    """The noise of the branches that do not know a half, as our keys give it, in the order that PyTorch draws it."""
    keys = jax.vmap(jax.random.split)(flaxdiff.schedulers.image_keys(KEY, 1))[:, 0]
    fold, drawn = jax.random.fold_in, []
    for row in range(STEPS):
        key = fold(fold(keys[0], unidiffuser.ANEW), row)
        image, text = jax.random.normal(fold(key, 0), (PIXELS + 20,)), jax.random.normal(fold(key, 1), (1, 16, 12))
        if mode != "text2img":
            drawn.append(peers.nchw(image[None, :PIXELS].reshape(1, SIDE, SIDE, 4)))
            drawn.append(torch.tensor(np.asarray(image[None, None, PIXELS:])))
        if mode != "img2text":
            drawn.append(torch.tensor(np.asarray(text)))
    return drawn


def run_there(peer, options):
    """What PyTorch's pipeline makes, and the sample that it ends with, its picture's channels last."""
    there, seen = {name: peers.nchw(a) if a.ndim == 4 else torch.tensor(a) for name, a in NOISE.items()}, []
    peer.mode = options.get("mode")
    given = {k: v for k, v in options.items() if k != "mode"}
    with torch.no_grad():
        made = peer(**given, **there, callback=lambda i, t, latents: seen.append(latents))
    sample = seen[-1].numpy()
    if sample.ndim == 2:
        picture = sample[:, :PIXELS].reshape(-1, 4, SIDE, SIDE).transpose(0, 2, 3, 1)
        sample = np.concatenate([picture.reshape(-1, PIXELS), sample[:, PIXELS:]], 1)
    return made, sample


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("text2img", dict(prompt="red")),
        ("text2img", dict(prompt="red", guidance_scale=1.0, data_type=0)),
        ("img2text", dict(image=PICTURE)),
        ("joint", {}),
        ("joint", dict(guidance_scale=1.0)),
        ("img", dict(mode="img")),
        ("text", dict(mode="text")),
    ],
)
def test_unidiffuser(mode, options, monkeypatch):
    """The sample that a run ends with."""
    pipe, params, peer = load(unidiffuser_pipeline)
    options = dict(num_inference_steps=STEPS, output_type="latent", **options)
    draws = iter(unknown(mode))
    monkeypatch.setattr(pipeline_unidiffuser, "randn_tensor", lambda *a, **k: next(draws))
    monkeypatch.setattr(peer, "decode_text_latents", lambda *a: None)
    _, theirs = run_there(peer, options)
    assert peers.relative(pipe(params, KEY, **options, **NOISE).images, theirs, of="UniDiffuserPipeline") < 1e-3
    inputs = pipe.prepare_inputs(**{k: v for k, v in options.items() if k != "output_type"}, **NOISE)
    assert inputs["size"].mode == mode


@pytest.mark.parametrize("options", [dict(prompt="red"), dict(image=PICTURE), {}])
def test_pictures_and_words(options, monkeypatch):
    """What the sample stands for."""
    pipe, params, peer = load(unidiffuser_pipeline)
    options = dict(num_inference_steps=STEPS, output_type="np", **options)
    draws = iter(unknown("text2img" if "prompt" in options else "img2text" if "image" in options else "joint"))
    monkeypatch.setattr(pipeline_unidiffuser, "randn_tensor", lambda *a, **k: next(draws))
    theirs, _ = run_there(peer, options)
    made = pipe(params, KEY, **options, **NOISE)
    assert made.text == theirs.text and (made.images is None) == (theirs.images is None)
    if theirs.images is not None:
        assert peers.relative(made.images, theirs.images, of="UniDiffuserPipeline") < 1e-3


def test_modes_are_set_and_inferred():
    pipe, _, _ = load(unidiffuser_pipeline)
    options = dict(num_inference_steps=2)
    of = lambda pipe, **given: pipe.prepare_inputs(**options, **given)["size"].mode
    assert of(pipe, prompt="red") == "text2img" and of(pipe, image=PICTURE) == "img2text" and of(pipe) == "joint"
    names = list(NOISE)
    assert of(pipe, **{k: NOISE[k] for k in names[:2]}) == "img"
    assert of(pipe, prompt_latents=NOISE["prompt_latents"]) == "text"
    assert of(pipe, vae_latents=NOISE["vae_latents"]) == "joint" == of(pipe, **NOISE)
    with pytest.warns(UserWarning, match="the prompt is drawn"):
        assert of(pipe, prompt="red", image=PICTURE) == "text2img"
    assert of(pipe.set_image_to_text_mode(), prompt="red", image=PICTURE) == "img2text"
    assert of(pipe.set_text_mode()) == "text" and of(pipe.set_text_mode().set_image_mode()) == "img"
    assert of(pipe.set_text_mode().reset_mode()) == "joint" == of(pipe.set_joint_mode(), prompt="red")
    several = pipe.prepare_inputs(image=[PICTURE] * 2, num_prompts_per_image=3, **options)
    assert len(several["index"]) == len(several["image"]) == 6
    assert len(pipe.prepare_inputs(num_prompts_per_image=3, num_images_per_prompt=2, **options)["index"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="audio"), "mode='audio' is not known; use one of"),
        (dict(mode="img2text"), "describes a picture; give image="),
        (dict(mode="text2img"), "needs a prompt or prompt_embeds, and was given neither"),
        (dict(prompt="red", height=32), "pictures of 32 x 16 pixels; this network has places for 16 x 16 alone"),
        (dict(image=PICTURE.resize((32, 16))), "pictures of 16 x 32 pixels"),
        (dict(vae_latents=normal(1, 4, 8, 8)), r"vae_latents have shape \(1, 4, 8, 8\); expected \[B, 8, 8, 4\]"),
        (dict(prompt="red", latents=normal(1, 8)), r"latents have shape \(1, 8\); expected \[B, 276\]"),
    ],
)
def test_what_unidiffuser_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        load(unidiffuser_pipeline)[0].prepare_inputs(num_inference_steps=2, **options)


def test_both_ahead_of_time_saved_and_by_key(tmp_path):
    """Pictures and words in one program; what is drawn is the key's; the folder is PyTorch's again."""
    pipe, params, peer = load(unidiffuser_pipeline)
    inputs = pipe.prepare_inputs(num_images_per_prompt=2, num_prompts_per_image=2, num_inference_steps=2)
    made = pipe.compile(params, inputs).generate(params, KEY, inputs)
    assert made.images.shape == (2, 16, 16, 3) and made.tokens.shape == (2, 67) and made.lengths.dtype == np.int32
    assert float(np.abs(made.images[0] - made.images[1]).max()) > 0.01
    flaxdiff.save(tmp_path, pipe.set_text_mode(), params)
    again = diffusers.UniDiffuserPipeline.from_pretrained(tmp_path)
    theirs, ours = again.unet.state_dict(), peer.unet.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert again.clip_image_processor.size["shortest_edge"] == 32
    assert flaxdiff.load(tmp_path)[0].prepare_inputs(prompt="red")["size"].mode == "text"
