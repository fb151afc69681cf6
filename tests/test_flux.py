"""Flux against PyTorch: its transformer, and every pipeline of it."""

import functools

import diffusers
import jax
import numpy as np
import peers
import pytest
import torch

import flaxdiff

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
SIZES = dict(num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=12, axes_dims_rope=(4, 4, 4))
SIZES |= dict(in_channels=16, joint_attention_dim=24, pooled_projection_dim=16)


@functools.cache
def transformer(**options):
    torch.manual_seed(0)
    return peers.lively(diffusers.FluxTransformer2DModel(**SIZES | options))


# --- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scan", "guided", "repeat"), [(True, True, False), (False, False, True)])
def test_transformer(scan, guided, repeat, tmp_path):
    """With what ControlNets add; and all times at once are each of them."""
    peer = transformer(guidance_embeds=guided)
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.FluxTransformer2DModel.from_pretrained(tmp_path, scan_layers=scan)
    x, text, pooled, t, ids = normal(2, 6, 16), normal(2, 5, 24), normal(2, 16), np.float32([0.3, 0.9]), normal(6, 3)
    added = normal(1 + repeat, 2, 6, 24), normal(2, 2, 6, 24)
    strength = np.float32([3.5, 1.5]) if guided else None
    there = functools.partial(torch.tensor)
    with torch.no_grad():
        theirs = peer(
            *map(there, (x, text, pooled, t, ids)),
            txt_ids=torch.zeros(5, 3),
            guidance=None if strength is None else there(strength),
            controlnet_block_samples=list(there(added[0])),
            controlnet_single_block_samples=list(there(added[1])),
            controlnet_blocks_repeat=repeat,
        ).sample

    @jax.jit
    def run(params, t, pooled, strength):
        rest = ids, None, strength, *added, repeat
        return flaxdiff.apply(spec, params, x, text, pooled, t, *rest)

    ours = run(params, t, pooled, strength)
    assert peers.relative(ours, theirs, of="FluxTransformer2DModel") < 1e-4
    several = np.float32([[0.1], [0.7]])
    told = flaxdiff.apply(spec, params, several, pooled, strength, method="times")
    assert (
        peers.relative(run(params, jax.tree.map(lambda a: a[1], told), None, None), run(params, 0.7, pooled, strength))
        < 1e-5
    )


def test_guidance_is_for_networks_that_were_distilled():
    spec = flaxdiff.FluxTransformer2DModel.from_config(SIZES)
    arrays = flaxdiff.abstract(spec), normal(1, 6, 16), normal(1, 5, 24), normal(1, 16), 0.5, normal(6, 3)
    with pytest.raises(ValueError, match="was not distilled with guidance .guidance_embeds.; leave guidance out"):
        jax.eval_shape(lambda params, *args: flaxdiff.apply(spec, params, *args, None, np.ones(1)), *arrays)
