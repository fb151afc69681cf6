"""Caches that leave out blocks of a transformer, or their attention, against diffusers' hooks.

Each is run over evaluations of samples that change little and much, by diffusers and here: the answers agree,
and so does the number of attentions that are computed.
"""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import test_sd3
import torch
from diffusers.hooks import apply_first_block_cache, apply_mag_cache
from diffusers.models.cache_utils import CacheMixin

import flaxdiff
from flaxdiff import caching, core
from flaxdiff.nn import attention, joint

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)
STEPS = 10
NEAR, FAR = [500.0] * STEPS, [900.0, 790.0, 780.0, 770.0, 700.0, 500.0, 400.0, 300.0, 90.0, 50.0]  # times of them
RATIOS = [1.0, 1.02, 0.99, 1.2, 0.97]


def flux() -> torch.nn.Module:
    sizes = dict(num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=12, in_channels=16)
    sizes |= dict(axes_dims_rope=(4, 4, 4), joint_attention_dim=24, pooled_projection_dim=16)
    torch.manual_seed(0)
    return peers.lively(diffusers.FluxTransformer2DModel(**sizes))


class Case(NamedTuple):
    """A network: PyTorch's, of what shape its sample is, and how either asks it about a sample at a time."""

    peer: Callable[[], torch.nn.Module]
    shape: tuple[int, ...]
    there: Callable
    here: Callable


TEXT, POOLED, IDS = normal(2, 5, 24), normal(2, 16), normal(6, 3)
WORDS, OF_WORDS, CAPTION = normal(2, 7, 56), normal(2, 48), normal(2, 5, 16)
given = lambda *arrays: tuple(map(torch.tensor, arrays))
CASES = {
    "flux": Case(
        flux,
        (2, 6, 16),
        lambda net, x, t: net(*given(x, TEXT, POOLED), t / 1000, *given(IDS, np.zeros((5, 3), np.float32))).sample,
        lambda run, x, t: run(x, TEXT, POOLED, t / 1000, IDS),
    ),
    "sd3": Case(
        lambda: copy.deepcopy(test_sd3.transformer(dual_attention_layers=(0, 1), qk_norm="rms_norm")),
        (2, 4, 8, 16),
        lambda net, x, t: peers.nhwc(net(peers.nchw(x), *given(WORDS, OF_WORDS), t).sample),
        lambda run, x, t: run(x, WORDS, OF_WORDS, t),
    ),
    "pixart": Case(
        peers.pixart,
        (2, 4, 8, 4),
        lambda net, x, t: peers.nhwc(net(peers.nchw(x), *given(CAPTION), timestep=t).sample),
        lambda run, x, t: run(x, CAPTION, t),
    ),
}


@functools.cache
def samples(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Those of the evaluations."""
    near, far = normal(*shape), normal(*shape)
    return [near, near + 0.001, near + 0.002, far, far + 0.001, near, near, far, far, far]


class Network(NamedTuple):
    """One branch, as a cache asks it."""

    ask: Callable[[], jax.Array]
    index: jax.Array
    timestep: jax.Array
    steps: jax.Array = jnp.int32(STEPS)
    branches = ("positive",)
    depths = ()

    def __call__(self, branches=None, notes=(), skip=None, reuse=None):
        notes = {kind: [] for kind in notes}
        with core.setting_of(core.skipping, skip), core.setting_of(core.reusing, reuse):
            with core.setting_of(core.noted, notes or None):
                return caching.Answer({"positive": self.ask()}, None), notes


@pytest.fixture
def attended(monkeypatch) -> Iterator[dict[str, int]]:
    """How many attentions have been computed, there and here."""
    counts = {"there": 0, "here": 0}

    def count(where: str) -> None:
        counts[where] += 1

    def counting(where: str, attend: Callable) -> Callable:
        def counted(*args, **kwargs):
            count(where) if where == "there" else jax.debug.callback(lambda: count(where))
            return attend(*args, **kwargs)

        return counted

    there, here = torch.nn.functional.scaled_dot_product_attention, attention.attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting("there", there))
    for module in (attention, joint):
        monkeypatch.setattr(module, "attention", counting("here", here))
    yield counts


def compared(
    case: Case, cache: caching.Cache, theirs: Callable, scan: bool, folder, attended, times=NEAR
) -> tuple[list[int], list]:
    """Evaluate both, check that they agree: how many attentions each evaluation computes, and what is kept of it."""
    peer = case.peer()
    peer.save_pretrained(folder)
    spec, params = getattr(flaxdiff, type(peer).__name__).from_pretrained(folder, scan_layers=scan)
    network = lambda x, t, i: Network(lambda: case.here(functools.partial(core.apply, spec, params), x, t), i, t)
    xs = samples(case.shape)
    kept = caching.blank(cache, network(xs[0], jnp.float32(0), jnp.int32(0)))
    run = jax.jit(lambda kept, x, t, i: caching.evaluate(cache, kept, network(x, t, i)))
    ask, computed, memories = theirs(peer), [], []
    for i, (x, t) in enumerate(zip(xs, times)):
        before = dict(attended)
        with torch.no_grad():
            expected = ask(x, torch.full((2,), t))
        kept = run(kept, x, np.float32(t), i)
        jax.effects_barrier()
        assert peers.relative(kept[0].predictions["positive"], expected) < 1e-4, i
        memories.append(kept[1])
        computed.append(attended["here"] - before["here"])
        assert computed[-1] == attended["there"] - before["there"], i
    return computed, memories


def hooked(case: Case, apply: Callable, config) -> Callable:
    """A network of PyTorch on which diffusers has put its hooks."""

    def ready(peer):
        apply(peer, config)

        def ask(x, t):
            with CacheMixin.cache_context(peer, "one"):
                return case.there(peer, x, t)

        return ask

    return ready


@pytest.mark.parametrize("scan", [True, False])
def test_first_block(scan, tmp_path, attended):
    case = CASES["flux"]
    theirs = hooked(case, apply_first_block_cache, diffusers.FirstBlockCacheConfig(threshold=0.1))
    computed, _ = compared(case, caching.first_block(0.1), theirs, scan, tmp_path, attended)
    first, whole = min(computed), max(computed)
    assert [n == first for n in computed[:6]] == [False, True, True, False, True, False] and first < whole


@pytest.mark.parametrize("name, scan", [("flux", True), ("sd3", False)])
def test_mag_cache(name, scan, tmp_path, attended):
    """A run twice as long as that which was measured, of which the first fifth is whole."""
    case = CASES[name]
    options = dict(threshold=0.15, max_skip_steps=2, retention_ratio=0.2)
    there = diffusers.MagCacheConfig(**options, num_inference_steps=STEPS, mag_ratios=RATIOS)
    cache = caching.mag_cache(**options, mag_ratios=flaxdiff.guidance.Curve(RATIOS).over(STEPS, 64))
    computed, _ = compared(case, cache, hooked(case, apply_mag_cache, there), scan, tmp_path, attended)
    whole = max(computed)
    assert [n == whole for n in computed] == [True, True, False, False, True, False, True, True, False, False]
    assert min(computed) == 0


def published(case: Case, threshold: float) -> Callable:
    """TeaCache as its authors put it into diffusers' Flux."""

    def ready(peer):
        first, rest = peer.transformer_blocks[0], [*peer.transformer_blocks, *peer.single_transformer_blocks]
        polynomial, at = np.poly1d(caching.FLUX_COEFFICIENTS), {"n": 0, "total": 0.0}

        def decide(module, args, kwargs):
            read = first.norm1(kwargs["hidden_states"], emb=kwargs["temb"])[0]
            if at["n"] in (0, STEPS - 1):
                whole = True
            else:
                share = (read - at["read"]).abs().mean() / at["read"].abs().mean()
                at["total"] += polynomial(share.item())
                whole = not at["total"] < threshold
            at.update(read=read, whole=whole, n=at["n"] + 1, start=kwargs["hidden_states"])
            at["total"] = 0.0 if whole else at["total"]

        def settle(module, args):
            if at["whole"]:
                at["added"] = args[0] - at["start"]
            return (at["start"] + at["added"], *args[1:])

        first.register_forward_pre_hook(decide, with_kwargs=True)
        peer.norm_out.register_forward_pre_hook(settle)
        for block in rest:
            own = block.forward
            block.forward = lambda own=own, **given: (
                own(**given) if at["whole"] else (given["encoder_hidden_states"], given["hidden_states"])
            )
        return lambda x, t: case.there(peer, x, t)

    return ready


@pytest.mark.parametrize("scan", [True, False])
def test_tea_cache(scan, tmp_path, attended):
    case = CASES["flux"]
    computed, _ = compared(case, caching.tea_cache(0.4), published(case, 0.4), scan, tmp_path, attended)
    assert (
        computed[0] == computed[-1] == 4
        and 2 < computed.count(4) < STEPS
        and computed.count(0) == STEPS - computed.count(4)
    )


@pytest.mark.parametrize("name, scan", [("flux", True), ("sd3", True), ("pixart", False), ("pixart", True)])
def test_pyramid_attention_broadcast(name, scan, tmp_path, attended):
    case = CASES[name]
    ranges = dict(spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800))
    if name == "pixart":
        ranges |= dict(cross_attention_block_skip_range=3, cross_attention_timestep_skip_range=(60, 750))

    def theirs(peer):
        at = {}
        config = diffusers.PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: at["t"])
        diffusers.apply_pyramid_attention_broadcast(peer, config)

        def ask(x, t):
            at["t"] = float(t[0])
            return case.there(peer, x, t)

        return ask

    cache = caching.pyramid_attention_broadcast(**ranges)
    computed, _ = compared(case, cache, theirs, scan, tmp_path, attended, FAR)
    spatial = [i % 2 == 0 or not 100 < t < 800 for i, t in enumerate(FAR)]
    cross = [i % 3 == 0 or not 60 < t < 750 for i, t in enumerate(FAR)]
    each = {"flux": (4, 0), "sd3": (6, 0), "pixart": (3, 3)}[name]
    assert computed == [each[0] * s + each[1] * c for s, c in zip(spatial, cross)]


# --- of a pipeline ---------------------------------------------------------------------------------------------------

PROMPT = dict(prompt=["a cat", "red"], negative_prompt="b", num_inference_steps=4, output_type="np")
STRENGTHS = {  # with nothing saved, and with much
    "first_block": ({"threshold": 0.0}, {"threshold": 100.0}),
    "tea_cache": ({"rel_l1_thresh": -1.0}, {"rel_l1_thresh": 1e9}),
    "mag_cache": (
        {"threshold": -1.0, "mag_ratios": [1.0, 1.1]},
        {"threshold": 9.0, "retention_ratio": 0.0, "mag_ratios": caching.FLUX_MAG_RATIOS},
    ),
    "pyramid_attention_broadcast": (
        {"spatial_attention_block_skip_range": 1},
        {"cross_attention_block_skip_range": 2, "cross_attention_timestep_skip_range": (0, 1000)},
    ),
}


@functools.cache
def pixart():
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(peers.pixart_sigma))
    return pipe.replace(progress=False), params


@pytest.mark.parametrize("name", STRENGTHS)
def test_of_a_pipeline(name):
    """With nothing saved the pictures are the same; with much they differ, and no strength compiles anything."""
    pipe, params = pixart()
    cached = pipe.replace(cache=getattr(caching, name))
    nothing, much = STRENGTHS[name]
    plain = pipe(params, KEY, **PROMPT).images
    np.testing.assert_allclose(cached(params, KEY, **PROMPT, **nothing).images, plain, atol=1e-5)
    compiled = peers.programs()
    assert np.abs(cached(params, KEY, **PROMPT, **much).images - plain).max() > 1e-4
    assert peers.programs() == compiled


def test_magnitudes(tmp_path, attended, capsys):
    """What diffusers' calibration prints, of one branch; and a call takes it."""
    config = diffusers.MagCacheConfig(calibrate=True, num_inference_steps=STEPS)
    theirs = hooked(CASES["flux"], apply_mag_cache, config)
    _, memories = compared(CASES["flux"], caching._measuring(), theirs, True, tmp_path, attended)
    printed = json.loads(capsys.readouterr().out.split("):")[1])
    np.testing.assert_allclose([ratio for ratio, _ in memories], printed, rtol=1e-4)

    pipe, params = pixart()
    options = {k: v for k, v in PROMPT.items() if k not in ("output_type", "negative_prompt")} | {"guidance_scale": 1.0}
    ratios = caching.magnitudes(pipe, params, KEY, **options)
    assert len(ratios) == 4 and ratios[0] == 1
    cached = pipe.replace(cache=caching.mag_cache)
    assert cached(params, KEY, **PROMPT, mag_ratios=ratios).images.shape == (2, 256, 256, 3)


def test_beside_a_controlnet():
    """What is remembered is of the network in the loop alone."""
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(peers.stable_diffusion_1))
    net = functools.partial(peers.controlnet, peers.stable_diffusion_1().unet)
    spec, own = flaxdiff.ControlNetModel.from_pretrained(peers.saved(net))
    followed = flaxdiff.StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=spec)

    def rows(pipe, params, **options):
        pipe = pipe.replace(cache=caching.pyramid_attention_broadcast)
        inputs = pipe.prepare_inputs(prompt="cat", num_inference_steps=1, **options)
        return len(jax.eval_shape(pipe.program.begin, params, KEY, inputs)[1].kept[1])

    picture = rng.uniform(size=(1, 64, 64, 3)).astype(np.float32)
    assert rows(followed, params | {"controlnet": own}, image=picture) == rows(pipe, params)


def test_what_does_not_go():
    pipe, params = flaxdiff.load()
    few = dict(prompt="a cat", num_inference_steps=1)
    for name, (nothing, _) in STRENGTHS.items():
        if name != "pyramid_attention_broadcast":
            with pytest.raises(ValueError, match=f"{name} is for transformers that are rows of blocks"):
                pipe.replace(cache=getattr(caching, name))(params, KEY, **few, **nothing)
    with pytest.raises(ValueError, match="mag_cache needs mag_ratios"):
        pipe.replace(cache=caching.mag_cache)(params, KEY, **few)
    with pytest.raises(ValueError, match=r"mag_ratios has shape \[1, 2\]; give a list of numbers"):
        pipe.replace(cache=caching.mag_cache).prepare_inputs(**few, mag_ratios=[[1.0, 2.0]])
    with pytest.raises(ValueError, match="coefficients has 2 numbers; give 5"):
        pipe.replace(cache=caching.tea_cache).prepare_inputs(**few, coefficients=[1.0, 2.0])
