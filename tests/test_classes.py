"""Pipelines that draw a class and not a prompt, against PyTorch's with the same noise."""

import diffusers
import jax
import numpy as np
import peers
import pytest
import torch

import flaxdiff

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)


def consistency(**options):
    """As published for ImageNet, in small: stages that attend resample by residual blocks, and there are classes."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 16, 32),
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "norm_num_groups": 8,
            "attn_norm_num_groups": 8,
            "layers_per_block": 1,
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "num_class_embeds": 10,
            **options,
        }
    ).eval()
    return diffusers.ConsistencyModelPipeline(net, diffusers.CMStochasticIterativeScheduler())


def plain_consistency():
    return consistency(num_class_embeds=None)


def load(build):
    peer = build()
    peer.set_progress_bar_config(disable=True)
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(build))
    assert type(pipe).__name__ == type(peer).__name__
    return pipe.replace(progress=False), params, peer


def test_unet_2d_with_classes():
    pipe, params, peer = load(consistency)
    x, t, labels = normal(2, 8, 8, 3), np.float32([3, 981]), np.int32([7, 0])
    with torch.no_grad():
        theirs = peer.unet(peers.nchw(x), torch.tensor(t), torch.tensor(labels)).sample
    ours = flaxdiff.apply(pipe.unet, params["unet"], x, t, labels)
    assert peers.relative(ours, peers.nhwc(theirs), of="UNet2DModel") < 1e-4
    with pytest.raises(ValueError, match="conditioned on one of 10 classes: give class_labels"):
        flaxdiff.apply(pipe.unet, params["unet"], x, t)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (consistency, dict(class_labels=[3, 8], num_inference_steps=1)),
        (consistency, dict(class_labels=[3, 8], num_inference_steps=None, timesteps=[22, 0])),
        (plain_consistency, dict(num_inference_steps=None, timesteps=[17, 5, 0])),
    ],
)
def test_consistency_models(build, options, monkeypatch):
    pipe, params, peer = load(build)
    latents, draws = normal(2, 8, 8, 3), [normal(2, 8, 8, 3) for _ in range(3)]
    queue = iter(draws)
    module = diffusers.schedulers.scheduling_consistency_models
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: peers.nchw(next(queue)))
    with torch.no_grad():
        theirs = peer(**options, batch_size=2, latents=peers.nchw(latents), output_type="np").images
    inputs = pipe.prepare_inputs(**options, batch_size=2, latents=latents)
    made = peers.with_noise(pipe, params, inputs, draws)
    assert peers.relative(made, theirs, of="ConsistencyModelPipeline") < 1e-3


def test_any_class_is_the_key_s():
    """One for each picture, from the whole range; a program of its own is not needed."""
    pipe, params, _ = load(consistency)
    made = lambda **options: pipe(params, KEY, batch_size=4, output_type="np", **options).images
    drawn = made()
    labels = [pipe.program.begin(params, KEY, pipe.prepare_inputs(batch_size=64))[0].branches["positive"]]
    labels = np.asarray(labels[0]["class_labels"])
    assert set(labels) == set(range(10))
    np.testing.assert_allclose(drawn, made(class_labels=labels[:4]), atol=2e-6)
    sizes = peers.programs()
    made(class_labels=[3])
    assert peers.programs() == sizes


@pytest.mark.parametrize("labels", [[3, 10], [-1], [0.5], [], "cat"])
def test_bad_classes(labels):
    with pytest.raises(ValueError, match="give whole numbers from 0 to 9, one a picture"):
        load(consistency)[0].prepare_inputs(class_labels=labels)


def test_no_classes():
    with pytest.raises(ValueError, match="knows no classes; leave out class_labels"):
        load(plain_consistency)[0].prepare_inputs(class_labels=3)
