"""PixArt against diffusers: the transformer, and the pipelines of both generations."""

import functools

import diffusers
import jax
import numpy as np
import peers
import pytest
import torch
from diffusers.pipelines.pag import pipeline_pag_pixart_sigma
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma

import flaxdiff
from flaxdiff.checkpoint import hub
from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.tasks import binned
from flaxdiff.training import emoji, evaluate

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)


@pytest.mark.parametrize(("told_sizes", "scan"), [(True, True), (False, True), (False, False)])
def test_transformer(told_sizes, scan, tmp_path):
    """Places beyond those of its training, and texts of two lengths."""
    peer = peers.pixart(told_sizes)
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.PixArtTransformer2DModel.from_pretrained(tmp_path, scan_layers=scan)
    x, t, text = normal(2, 8, 36, 4), np.float32([3, 981]), normal(2, 7, 16)
    mask = np.arange(7) < np.array([[7], [3]])
    added = {"resolution": np.float32([[64, 288], [9, 5]]), "aspect_ratio": np.float32([[0.2], [1.8]])}
    with torch.no_grad():
        there = {k: torch.tensor(v) for k, v in added.items()}
        theirs = peer(
            peers.nchw(x), torch.tensor(text), torch.tensor(t), there, encoder_attention_mask=torch.tensor(mask)
        )
    ours = flaxdiff.apply(spec, params, x, text, t, added, mask)
    assert peers.relative(ours, peers.nhwc(theirs.sample), of="PixArtTransformer2DModel") < 1e-4
    if told_sizes:
        with pytest.raises(ValueError, match="needs added_cond_kwargs with resolution and aspect_ratio"):
            flaxdiff.apply(spec, params, x, text, t)


@functools.cache
def load():
    return *flaxdiff.load(peers.saved(peers.pixart_sigma)), peers.pixart_sigma()


PROMPTS = ["A red  dog", "cats and dogs"]
OPTIONS = dict(num_inference_steps=2, max_sequence_length=16)


def theirs_of(peer, latents, monkeypatch, **options):
    options = {**OPTIONS, **options}
    for module in (pipeline_pixart_alpha, pipeline_pixart_sigma, pipeline_pag_pixart_sigma):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: peers.nchw(latents))
    with torch.no_grad():
        return peer(**options, clean_caption=False, output_type="np").images


@pytest.mark.parametrize("scale", [4.5, 1.0])
def test_sigma(scale, monkeypatch):
    pipe, params, peer = load()
    size = dict(height=64, width=96, use_resolution_binning=False)
    options = dict(prompt=PROMPTS, negative_prompt="a", guidance_scale=scale, **size)
    latents = normal(2, 8, 12, 4)
    theirs = theirs_of(peer, latents, monkeypatch, **options)
    made = pipe(params, KEY, **OPTIONS, **options, latents=latents, output_type="np").images
    assert peers.relative(made, theirs, of="PixArtSigmaPipeline") < 1e-3


def test_alpha_of_any_size(tmp_path, monkeypatch):
    """Made at the trained size of the nearest aspect, which the network is told, and resized."""
    pipe, params, base = load()
    net = peers.pixart(told_sizes=True)
    net.save_pretrained(tmp_path)
    spec, of_net = flaxdiff.PixArtTransformer2DModel.from_pretrained(tmp_path)
    # PyTorch's pipeline tells sizes to a network that says it was trained on this one; the real one is a quarter
    net.register_to_config(sample_size=128)
    monkeypatch.setattr(pipeline_pixart_alpha, "ASPECT_RATIO_1024_BIN", pipeline_pixart_alpha.ASPECT_RATIO_256_BIN)
    peer = diffusers.PixArtAlphaPipeline(base.tokenizer, base.text_encoder, base.vae, net, base.scheduler)
    pipe = flaxdiff.PixArtAlphaPipeline.from_pipe(pipe).replace(transformer=spec)
    latents, options = normal(1, 20, 50, 4), dict(prompt="a red dog", height=150, width=390)
    theirs = theirs_of(peer, latents, monkeypatch, **options)
    made = pipe(params | {"transformer": of_net}, KEY, **OPTIONS, **options, latents=latents, output_type="np").images
    assert made.shape == (1, 150, 390, 3)
    assert peers.relative(made, theirs, of="PixArtAlphaPipeline") < 1e-3


def test_the_one_that_is_shipped(monkeypatch):
    """PyTorch's diffusers draws the same pictures with it; and it knows its emoji, in eight steps."""
    pipe, params = flaxdiff.load("emoji-flow", dtype="float32")
    peer = diffusers.PixArtAlphaPipeline.from_pretrained(hub.SHIPPED["emoji-flow"], torch_dtype=torch.float32)
    prompts, latents = ["dog face on blue", "slice of pizza"], normal(2, 16, 16, 8)
    own = dict(num_inference_steps=8, guidance_scale=1.5, max_sequence_length=36, use_resolution_binning=False)
    theirs = theirs_of(peer, latents, monkeypatch, prompt=prompts, **own)
    made = pipe(params, KEY, prompt=prompts, latents=latents, output_type="np").images
    assert peers.relative(made, theirs, of="PixArtAlphaPipeline") < 1e-3
    if emoji.FONT.exists():
        found = evaluate.on_white(evaluate.painter(pipe, params, 8, 1.5, size=33), range(0, 1386, 43))
        assert found["R@1"] > 0.9 and found["PSNR"] > 22


def test_sigma_with_perturbed_attention(monkeypatch):
    """Two of the blocks; by default it is the second."""
    pipe, params, base = load()
    parts = base.tokenizer, base.text_encoder, base.vae, base.transformer, base.scheduler
    peer = diffusers.PixArtSigmaPAGPipeline(*parts, pag_applied_layers=["blocks.1", "blocks.2"])
    pipe = flaxdiff.PixArtSigmaPAGPipeline.from_pipe(pipe)
    options = dict(prompt="a dog", height=64, width=96, use_resolution_binning=False, pag_scale=2.0)
    latents = normal(1, 8, 12, 4)
    theirs = theirs_of(peer, latents, monkeypatch, **options)
    call = functools.partial(pipe, params, KEY, **OPTIONS, latents=latents, output_type="np")
    made = call(**options, pag_applied_layers=["blocks.1", "blocks.2"]).images
    assert peers.relative(made, theirs, of="PixArtSigmaPAGPipeline") < 1e-3
    assert [int(flags.sum()) for flags in pipe.prepare_inputs(**options)["guidance"]["pag_applied_layers"]] == [1]


@pytest.mark.parametrize("side", [32, 64, 128, 256])
def test_sizes_of_training(side):
    """Those of diffusers' tables, for every aspect."""
    pipe = load()[0]
    pipe = pipe.replace(transformer=pipe.transformer.replace(sample_size=side))
    table = getattr(pipeline_pixart_sigma, f"ASPECT_RATIO_{8 * side}_BIN")
    for aspect in np.linspace(0.2, 4.5, 400):
        height, width = round(1000 * aspect), 1000
        theirs = diffusers.image_processor.PixArtImageProcessor.classify_height_width_bin(height, width, table)
        assert binned.nearest(pipe, Size(height, width)) == Size(*theirs)


def test_bad_input():
    pipe, params, _ = load()
    with pytest.raises(ValueError, match="by T5EncoderModel, and words are weighed for CLIP's text encoders alone"):
        flaxdiff.encode_prompts(pipe, params, "a (red)1.5 dog")
    with pytest.raises(ValueError, match="prompt_embeds and prompt_attention_mask go together"):
        pipe.prepare_inputs(prompt_embeds=normal(1, 5, 16))
    with pytest.raises(ValueError, match="clean_caption=True is not offered; give prompts as they are to be read"):
        pipe.prepare_inputs(prompt="<b>a</b>", clean_caption=True)
    with pytest.raises(ValueError, match="height=72, width=64: .* multiples of 16; the nearest are 64 and 64"):
        pipe.prepare_inputs(prompt="a", height=72, width=64, use_resolution_binning=False)
    other = pipe.replace(transformer=pipe.transformer.replace(sample_size=40))
    with pytest.raises(
        ValueError, match="sample_size=40 was trained on is not known; give use_resolution_binning=False"
    ):
        other.prepare_inputs(prompt="a")
    with pytest.warns(UserWarning, match="longer than 4 tokens; its end is not read: …'a red red red'"):
        pipe.prepare_inputs(prompt="a red red red", negative_prompt="", max_sequence_length=4)


def test_there_and_back(tmp_path):
    """PyTorch's diffusers loads what is saved."""
    pipe, params, peer = load()
    flaxdiff.save(tmp_path, pipe, params)
    again = diffusers.PixArtSigmaPipeline.from_pretrained(tmp_path)
    for name in ("transformer", "text_encoder"):
        theirs = getattr(again, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(peer, name).state_dict().items())
    assert again.tokenizer(PROMPTS).input_ids == peer.tokenizer(PROMPTS).input_ids


@pytest.mark.parametrize(
    ("made", "asked"), [((832, 1152), (960, 1280)), ((512, 1024), (960, 1920)), ((64, 32), (9, 7))]
)
def test_what_is_cut_off_is_there(made, asked):
    """Sides times their ratio may come out a hair short of what is asked."""
    cut = jax.eval_shape(
        lambda images: binned.filling(images, Size(*asked)), jax.ShapeDtypeStruct((1, *made, 3), np.float32)
    )
    assert cut.shape == (1, *asked, 3)
