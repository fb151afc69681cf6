"""Inversion, and the pipelines that edit by what is said, against PyTorch's from the same noise."""

import functools
import inspect

import diffusers
import jax
import numpy as np
import peers
import pytest
import torch
import transformers
from PIL import Image

import flaxdiff
from flaxdiff.pipelines import inversion

KEY = jax.random.key(0)
normal = lambda *shape: np.random.default_rng(0).standard_normal(shape).astype(np.float32)
picture = lambda side=16: np.random.default_rng(1).random((1, side, side, 3)).astype(np.float32)


def queue(monkeypatch, module, arrays):
    """PyTorch's draws from this module are these arrays, in their order."""
    left = iter(arrays)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: peers.nchw(next(left)))


def made(name, peer, **changes):
    """PyTorch's pipeline of this class, with the parts of another."""
    cls = getattr(diffusers, name)
    parts = {**peer.components, "feature_extractor": None, "safety_checker": None, **changes}
    return cls(**{k: v for k, v in parts.items() if k in inspect.signature(cls.__init__).parameters})


# --- DiffEdit --------------------------------------------------------------------------------------------------------


def diffedit():
    peer = peers.stable_diffusion_2()
    scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    inverse = diffusers.DDIMInverseScheduler.from_config(scheduler.config)
    changes = dict(vae=peers.sure(peer.vae), scheduler=scheduler, inverse_scheduler=inverse)
    return made("StableDiffusionDiffEditPipeline", peer, requires_safety_checker=False, **changes)


def load(build):
    peer = build()
    peer.set_progress_bar_config(disable=True)
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(build))
    assert type(pipe).__name__ == type(peer).__name__
    return pipe.replace(progress=False), params, peer


@pytest.mark.parametrize("negatives", [{}, dict(source_negative_prompt="d", target_negative_prompt="e")])
def test_diffedit_finds_where_prompts_disagree(negatives, monkeypatch):
    pipe, params, peer = load(diffedit)
    noise = normal(3, 8, 8, 4)
    queue(monkeypatch, __import__(type(peer).__module__, fromlist=["randn_tensor"]), [noise])
    options = dict(source_prompt="a red", target_prompt="b c", **negatives)
    others = dict(guidance_scale=5.0, num_maps_per_mask=3, mask_encode_strength=0.6, mask_thresholding_ratio=2.0)
    # PyTorch's takes each prompt for its negative, as its encode_prompt returns them the other way round.
    given = dict(options)
    for of in ("source", "target") if negatives else ():
        given[f"{of}_prompt"], given[f"{of}_negative_prompt"] = given[f"{of}_negative_prompt"], given[f"{of}_prompt"]
    with torch.no_grad():
        theirs = peer.generate_mask(peers.nchw(picture()), num_inference_steps=10, **given, **others)
    find = functools.partial(pipe.generate_mask, params, KEY, image=picture(), latents=noise, num_inference_steps=10)
    assert 0 < theirs.mean() < 1
    np.testing.assert_array_equal(find(**options, **others), theirs)
    unguided = find(**options, **{**others, "guidance_scale": 1.0})
    assert negatives or (unguided == theirs).all()  # the strength is the same for all places


@pytest.mark.parametrize("inverse", ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"])
@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_diffedit_inverts(scale, inverse):
    pipe, params, peer = load(diffedit)
    peer.inverse_scheduler = getattr(diffusers, inverse).from_config(peers.saved_config(diffedit))
    scheduler = getattr(flaxdiff, inverse).from_config(pipe.scheduler)
    options = dict(prompt="a red", guidance_scale=scale, num_inference_steps=10, inpaint_strength=0.65)
    with torch.no_grad():
        theirs = peer.invert(image=peers.nchw(picture()), **options).latents
    ours = pipe.invert(params, KEY, image=picture(), inverse_scheduler=scheduler, **options)
    assert ours.shape[1] == 6
    theirs = theirs.permute(0, 1, 3, 4, 2).numpy()
    assert peers.relative(ours, theirs, of=inverse) < 1e-3


@pytest.mark.parametrize("mask", ["array", "picture"])
def test_diffedit_paints(mask):
    pipe, params, peer = load(diffedit)
    path, where = normal(1, 6, 8, 8, 4), np.float32(np.eye(8)[None])
    given = where if mask == "array" else Image.fromarray(np.uint8(255 * where[0]))
    options = dict(prompt="b c", negative_prompt="d", mask_image=given, num_inference_steps=10, inpaint_strength=0.65)
    with torch.no_grad():
        theirs = peer(image_latents=torch.tensor(path).permute(0, 1, 4, 2, 3), output_type="np", **options).images
    ours = functools.partial(pipe, params, KEY, image_latents=path, output_type="np")
    assert peers.relative(ours(**options).images, theirs, of="StableDiffusionDiffEditPipeline") < 1e-3
    sizes = peers.programs()
    longer = dict(image_latents=normal(1, 13, 8, 8, 4), num_inference_steps=20)
    assert ours(**{**options, **longer}).images.shape == theirs.shape
    assert peers.programs() == sizes  # the length of the path is no part of the program


def test_there_and_back():
    """A run from what inversion found makes the picture again, the better the more steps."""
    pipe, params = flaxdiff.load()
    pipe = pipe.replace(progress=False, scheduler=flaxdiff.DDIMScheduler.from_config(pipe.scheduler, clip_sample=False))
    options = dict(height=32, width=32, guidance_scale=1.0, prompt="red apple", output_type="latent")
    made = pipe(params, KEY, num_inference_steps=20, **options).images

    def apart(n):
        path = flaxdiff.invert(pipe, params, KEY, image=made, prompt="red apple", num_inference_steps=n)
        again = pipe(params, KEY, latents=path[:, 0], num_inference_steps=n, **options).images
        return float(np.abs(again - made).mean() / np.abs(made).mean())

    assert apart(50) < 0.1 < apart(5)


def test_bad_input_of_diffedit():
    pipe, params, _ = load(diffedit)
    mask, path = np.ones((1, 8, 8)), normal(1, 6, 8, 8, 4)
    with pytest.raises(ValueError, match="give mask_image=, of generate_mask"):
        pipe.prepare_inputs(prompt="a", image_latents=path)
    with pytest.raises(ValueError, match="give image_latents=, of invert"):
        pipe.prepare_inputs(prompt="a", mask_image=mask)
    with pytest.raises(ValueError, match=r"expected \[B, n, h, w, C\]"):
        pipe.prepare_inputs(prompt="a", mask_image=mask, image_latents=path[0])
    with pytest.raises(ValueError, match=r"mask_image is \(4, 4\), and the latents \(8, 8\)"):
        pipe.prepare_inputs(prompt="a", mask_image=mask[:, :4, :4], image_latents=path)
    with pytest.raises(ValueError, match="path has samples for 6 evaluations, but the run has 8"):
        pipe.prepare_inputs(prompt="a", mask_image=mask, image_latents=path, num_inference_steps=10)
    with pytest.raises(ValueError, match="give source_prompt= as well"):
        pipe.generate_mask(params, KEY, image=picture(), target_prompt="a")
    with pytest.raises(TypeError, match="takes no 'goal_prompt'"):
        pipe.generate_mask(params, KEY, image=picture(), target_prompt="a", goal_prompt="b")
    with pytest.raises(ValueError, match="must be positive"):
        pipe.generate_mask(params, KEY, image=picture(), target_prompt="a", mask_thresholding_ratio=0)
    with pytest.raises(ValueError, match="does not start from noise alone"):
        flaxdiff.invert(pipe, params, KEY, image=picture())
    plain = flaxdiff.StableDiffusionPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="does not lead from a picture to noise"):
        flaxdiff.invert(plain, params, KEY, image=picture(), scheduler=pipe.scheduler)


# --- LEDITS++ --------------------------------------------------------------------------------------------------------


def three_levels(**options):
    """A U-Net that attends at a quarter of the sample's sides on its way down and up."""
    cross = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    levels = dict(block_out_channels=(8, 16, 16), down_block_types=cross[0], up_block_types=cross[1])
    return peers.unet(**{**levels, "sample_size": 16, **options})


def ledits(scheduler=diffusers.PNDMScheduler):
    changes = dict(unet=three_levels(), scheduler=scheduler(**peers.SD_BETAS), requires_safety_checker=False)
    return made("LEditsPPPipelineStableDiffusion", peers.stable_diffusion_1(), **changes)


def ledits_ddim():
    return ledits(functools.partial(diffusers.DDIMScheduler, clip_sample=False, set_alpha_to_one=False))


def ledits_xl():
    net = three_levels(
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 8 * 6,
        cross_attention_dim=32,
    )
    changes = dict(unet=net, add_watermarker=False)
    return made("LEditsPPPipelineStableDiffusionXL", peers.stable_diffusion_xl(), **changes)


def counts(monkeypatch):
    """PyTorch's counts the tokens of an edit; those of transformers 5 count the padding with them."""
    read = transformers.CLIPTokenizer.__call__

    def counting(self, text, return_length=False, **options):
        made = read(self, text, **options)
        if return_length:
            made["length"] = torch.tensor([len(read(self, words)["input_ids"]) for words in text])
        return made

    monkeypatch.setattr(transformers.CLIPTokenizer, "__call__", counting)


EDITS = [
    dict(edit_threshold=0.6),
    dict(edit_threshold=[0.6, 0.8], edit_guidance_scale=[4.0, 7.0], reverse_editing_direction=[False, True]),
    dict(use_intersect_mask=False, use_cross_attn_mask=True, edit_threshold=0.6),
    dict(use_intersect_mask=False, edit_warmup_steps=2, edit_cooldown_steps=5, edit_threshold=0.6),
    dict(user_mask=True, edit_threshold=0.6),
]
MORE = dict(EDITS[1], negative_prompt="d")


@pytest.mark.parametrize(
    ("build", "options", "source"),
    [(ledits, options, "a red" if n == 0 else "") for n, options in enumerate(EDITS)]
    + [(ledits_ddim, EDITS[0], ""), (ledits_xl, MORE, "a red")],
)
def test_ledits(build, options, source, monkeypatch):
    pipe, params, peer = load(build)
    name, n = type(peer).__name__, 8
    noise = normal(1, n, 16, 16, 4)
    queue(
        monkeypatch, __import__(type(peer).__module__, fromlist=["randn_tensor"]), [noise[:, i] for i in range(n)][::-1]
    )
    counts(monkeypatch)
    under = peer.scheduler.add_noise  # PyTorch's pipeline gives times as floats, which its DDIM does not take
    monkeypatch.setattr(peer.scheduler, "add_noise", lambda x, noise, t: under(x, noise, t.long()))
    inverting = dict(source_prompt=source, num_inversion_steps=n, skip=0.13)
    with torch.no_grad(), monkeypatch.context() as patch:
        if name == "LEditsPPPipelineStableDiffusion":  # PyTorch's takes one for the other, as they are returned
            text = peer.encode_prompt
            patch.setattr(peer, "encode_prompt", lambda **k: [text(**k)[i] for i in (1, 0, 2)])
        peer.invert(peers.nchw(picture(32)), **inverting)
    found = pipe.invert(params, KEY, image=picture(32), noise=noise, **inverting).inversion
    theirs = peer.zs.permute(1, 0, 3, 4, 2).numpy()
    assert peers.relative(found.noises, theirs) < 1e-3
    asked = {"editing_prompt": ["red", "b c"], "output_type": "np", **options}
    mask = np.float32(np.tri(16)) if "user_mask" in options else None
    told = {"user_mask": torch.tensor(mask)} if mask is not None else {}
    with torch.no_grad():
        theirs = peer(**{**asked, **told}).images
    ours = pipe(params, KEY, inversion=found, **{**asked, **({"user_mask": mask} if told else {})}).images
    assert peers.relative(ours, theirs, of=name) < 5e-3
    if options is EDITS[0]:
        assert peers.relative(ours, pipe(params, KEY, inversion=found, output_type="np").images) > 1e-2


def test_an_inversion_makes_its_picture_again():
    pipe, params = flaxdiff.LEditsPPPipelineStableDiffusion.from_pretrained(flaxdiff.EMOJI)
    pipe = pipe.replace(progress=False)
    image = np.full((32, 32, 3), 0.8)
    found = pipe.invert(params, KEY, image=image, num_inversion_steps=6)
    again = pipe(params, KEY, inversion=found.inversion, output_type="np").images
    # but for the last step, which draws no noise that could make up for what the network says
    np.testing.assert_allclose(again[0], np.asarray(found.vae_reconstruction_images[0]) / 255, atol=2 / 255)
    np.testing.assert_allclose(np.asarray(found.images[0]) / 255, image, atol=1 / 255)


def test_bad_input_of_ledits():
    pipe, params, _ = load(ledits)
    found = inversion.Inversion(normal(1, 16, 16, 4), normal(1, 8, 16, 16, 4), dict(num_inference_steps=8))
    ask = functools.partial(pipe.prepare_inputs, inversion=found, editing_prompt=["a", "b"])
    with pytest.raises(ValueError, match=r"give inversion=pipe.invert\(…\)"):
        pipe.prepare_inputs(editing_prompt="a")
    with pytest.raises(ValueError, match=r"user_mask has shape \(8, 8\); expected \[16, 16\]"):
        ask(user_mask=np.ones((8, 8)))
    with pytest.raises(ValueError, match="edit_threshold has 3 values for 2 prompts"):
        pipe(params, KEY, inversion=found, editing_prompt=["a", "b"], edit_threshold=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="noises has samples for 8 evaluations, but the run has 4"):
        ask(inversion=found._replace(schedule=dict(num_inference_steps=4)))
    plain = pipe.replace(scheduler=flaxdiff.DPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler draws no noise of its own at each step"):
        plain.invert(params, KEY, image=picture(32))
