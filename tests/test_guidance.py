"""Guidance: against diffusers' own formulas, per image, and in chains."""

import jax.numpy as jnp
import numpy as np
import peers
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from flaxdiff.guidance import Guidance, cfg, chain, rescale, standard

rng = np.random.default_rng(0)
POSITIVE, NEGATIVE = (rng.standard_normal((2, 4, 4, 3)).astype(np.float32) for _ in range(2))
BOTH = {"positive": jnp.asarray(POSITIVE), "negative": jnp.asarray(NEGATIVE)}


def guess(rule: Guidance):
    return rule.combine(rule.init(BOTH["positive"]), BOTH["positive"], BOTH)[0]


def test_rescale_is_diffusers():
    guided = NEGATIVE + 5 * (POSITIVE - NEGATIVE)
    theirs = rescale_noise_cfg(torch.tensor(guided), torch.tensor(POSITIVE), 0.7)
    assert peers.relative(guess(chain(cfg(5.0), rescale(0.7))), theirs) < 1e-6
    assert peers.relative(guess(standard({"guidance_scale": 5.0, "guidance_rescale": 0.7})), theirs) < 1e-6


def test_strengths_may_differ_by_image():
    both = guess(chain(cfg(jnp.array([1.0, 4.0])), rescale(jnp.array([0.0, 0.5]))))
    assert peers.relative(both[0], POSITIVE[0]) < 1e-6
    assert peers.relative(both[1], guess(chain(cfg(4.0), rescale(0.5)))[1]) < 1e-6


def test_a_rule_may_remember():
    """Momentum: the state goes from step to step through a chain."""
    count = Guidance(lambda x: jnp.int32(0), lambda n, g, p: (g + n.astype(g.dtype), n + 1))
    rule = chain(cfg(2.0), count)
    state = rule.init(BOTH["positive"])
    first, state = rule.combine(state, BOTH["positive"], BOTH)
    second, state = rule.combine(state, BOTH["positive"], BOTH)
    np.testing.assert_allclose(second - first, 1, atol=1e-6)
    assert state == ((), 2)
