"""ControlNets, T2I-Adapters and IP-Adapters against PyTorch's, alone and in whole pipelines."""

import jax
import numpy as np
import peers
import pytest
import torch

import flaxdiff

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
uniform = lambda *shape: rng.random(shape, np.float32)
KEY = jax.random.key(0)


def saved(model, folder):
    """A PyTorch model as ours: (spec, params)."""
    model.save_pretrained(folder)
    return getattr(flaxdiff, type(model).__name__).from_pretrained(folder)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("build", [peers.stable_diffusion_1, peers.stable_diffusion_xl])
def test_controlnet(build, pooled, tmp_path):
    """Alone, and what the U-Net makes of it."""
    unet = build().unet
    peer = peers.controlnet(unet, controlnet_conditioning_channel_order="bgr" if pooled else "rgb")
    peer.register_to_config(global_pool_conditions=pooled)
    (spec, params), (unet_spec, unet_params) = saved(peer, tmp_path / "c"), saved(unet, tmp_path / "u")
    x, t, text = normal(2, 10, 8, 4), np.float32([3, 981]), normal(2, 5, spec.config.cross_attention_dim)
    image, added = uniform(2, 20, 16, 3), None
    if spec.config.addition_embed_type:
        added = {"text_embeds": normal(2, 24), "time_ids": np.float32(rng.integers(0, 999, (2, 6)))}
    there = added and {k: torch.tensor(v) for k, v in added.items()}
    with torch.no_grad():
        args = peers.nchw(x), torch.tensor(t), torch.tensor(text)
        down, mid = peer(*args, peers.nchw(image), 0.7, added_cond_kwargs=there, guess_mode=True, return_dict=False)
        residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        theirs = unet(*args, added_cond_kwargs=there, **residuals).sample

    @jax.jit
    def run(params, unet_params, guess_mode):
        out = flaxdiff.apply(spec, params, x, t, text, image, 0.7, added, guess_mode)
        more = dict(down_block_additional_residuals=out[0], mid_block_additional_residual=out[1])
        return out, flaxdiff.apply(unet_spec, unet_params, x, t, text, added, **more)

    out, ours = run(params, unet_params, True)
    for mine, its in zip((*out.down_block_res_samples, out.mid_block_res_sample), (*down, mid), strict=True):
        assert peers.relative(mine, peers.nhwc(its)) < 1e-4
    assert peers.relative(ours, peers.nhwc(theirs)) < 1e-4


def test_controlnet_from_unet():
    """Adds nothing before it is trained, and holds the U-Net's first half."""
    pipe, params = flaxdiff.load()
    spec, mine = flaxdiff.ControlNetModel.from_unet(pipe.unet, params["unet"], KEY)
    x, text = normal(1, 8, 8, spec.config.in_channels), normal(1, 5, spec.config.cross_attention_dim)
    out = flaxdiff.apply(spec, mine, x, 10, text, uniform(1, 64, 64, 3))
    assert not any(np.any(np.asarray(r)) for r in out.down_block_res_samples)
    same = [name for name in mine if name in params["unet"]]
    assert len(same) > 50 and all((mine[name] == params["unet"][name]).all() for name in same)
