"""Each task of each family against PyTorch's pipeline of the same name, with the same noise."""

import diffusers
import jax
import numpy as np
import peers
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import flaxdiff
from flaxdiff import images

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)
PICTURE = rng.uniform(size=(1, 16, 16, 3)).astype(np.float32)
MASK = np.zeros((1, 16, 16, 1), np.float32)
MASK[:, 4:11, 3:14] = 1
pillow = lambda *shape: Image.fromarray(rng.integers(0, 255, shape, np.uint8))


def sure(vae):
    """An autoencoder whose posterior has no spread: PyTorch draws from its own generator, and here the key does."""
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] -= 60
    return vae


def made(build, name, scheduler, **parts):
    """PyTorch's pipeline of that name with the components of another, and ours of what it saves."""

    def peer():
        components = build().components | parts
        cls = getattr(diffusers, name)
        accepted = {k: v for k, v in components.items() if k in cls.__init__.__code__.co_varnames}
        settings = {"requires_safety_checker": False} if "XL" not in name else {"add_watermarker": False}
        settings = {k: v for k, v in settings.items() if k in cls.__init__.__code__.co_varnames}
        pipe = cls(**accepted, **settings)
        sure(pipe.vae)
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        return pipe

    there = peer()
    there.set_progress_bar_config(disable=True)
    if getattr(there, "text_encoder", None) is not None:
        there.text_encoder.__dict__["text_model"] = there.text_encoder
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(peer))
    assert type(pipe).__name__ == name
    return pipe.replace(progress=False), params, there


def compare(monkeypatch, pipe, params, peer, options, noise, ours=None, theirs=None):
    """Largest difference of the pictures as a share of the largest value; both are given the same noise."""
    draws = iter([noise] if isinstance(noise, np.ndarray) else noise)
    module = __import__(type(peer).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: peers.nchw(next(draws)))
    there = {k: peers.nchw(v) if isinstance(v, np.ndarray) and v.ndim == 4 else v for k, v in options.items()}
    with torch.no_grad():
        pictures = peer(**{"output_type": "np", **there, **(theirs or {})}).images
    latents = noise if isinstance(noise, np.ndarray) else noise[-1]
    run = pipe(params, KEY, **{"output_type": "np", **options, "latents": latents, **(ours or {})}).images
    if isinstance(run, list):
        return max(np.abs(np.int32(a) - np.int32(b)).max() for a, b in zip(run, pictures, strict=True)) / 255
    return peers.relative(run, pictures)


# --- inpainting ------------------------------------------------------------------------------------------------------

NINE = lambda: peers.unet(in_channels=9)


@pytest.mark.parametrize(
    ("name", "build", "parts", "scheduler"),
    [
        ("StableDiffusionInpaintPipeline", peers.stable_diffusion_1, {}, "DDIMScheduler"),
        ("StableDiffusionInpaintPipeline", peers.stable_diffusion_1, {"unet": {"in_channels": 9}}, "PNDMScheduler"),
        ("StableDiffusionXLInpaintPipeline", peers.stable_diffusion_xl, {}, "EulerDiscreteScheduler"),
        ("StableDiffusionXLInpaintPipeline", peers.stable_diffusion_xl, {"unet": {"in_channels": 9}}, "DDIMScheduler"),
    ],
)
def test_inpainting(name, build, parts, scheduler, monkeypatch):
    """Both kinds of network, in part and from noise alone; strength is a value."""
    parts = {k: type(v)(**{**getattr(build(), k).config, **v}) if 0 else v for k, v in parts.items()}
    if parts:
        torch.manual_seed(5)
        parts = {"unet": diffusers.UNet2DConditionModel.from_config({**build().unet.config, **parts["unet"]}).eval()}
    pipe, params, peer = made(build, name, scheduler, **parts)
    options = dict(prompt="cat", num_inference_steps=4, image=PICTURE, mask_image=MASK, guidance_scale=3.0)
    for strength in (0.6, 1.0):
        noise = normal(1, 8, 8, 4)
        assert compare(monkeypatch, pipe, params, peer, options | {"strength": strength}, noise) < 1e-3
