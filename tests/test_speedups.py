"""What saves work: merged tokens, and what is kept from step to step; and what changes how a U-Net weighs its parts."""

import functools
import itertools
from typing import NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import tomesd
import torch
from diffusers.models.cache_utils import CacheMixin

import flaxdiff
from flaxdiff import caching, core, guidance
from flaxdiff.guidance import Layers, chain, interval
from flaxdiff.nn.merging import merging

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)
TEXT = dict(prompt=["a cat", "red"], negative_prompt="b", num_inference_steps=3, output_type="np")
BASES = {"SD": peers.stable_diffusion_1, "XL": peers.stable_diffusion_xl}


@functools.cache
def load(base: str):
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(BASES[base]))
    return pipe.replace(scheduler=flaxdiff.DDIMScheduler.from_config(pipe.scheduler), progress=False), params


# --- FreeU -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_freeu(base):
    """Odd sizes too; each picture has its own factors."""
    pipe, params = load(base)
    unet = BASES[base]().unet
    factors = np.float32([[0.9, 0.2, 1.2, 1.4], [0.6, 0.4, 1.1, 1.2]])
    x, t, text = normal(2, 10, 14, 4), np.float32([3, 500]), normal(2, 5, unet.config.cross_attention_dim)
    added = {"text_embeds": normal(2, 24), "time_ids": np.ones((2, 6), np.float32)} if base == "XL" else None
    ours = jax.jit(lambda f: flaxdiff.apply(pipe.unet, params["unet"], x, t, text, added, freeu=f))(factors)
    for i, (s1, s2, b1, b2) in enumerate(factors.tolist()):
        unet.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)
        with torch.no_grad():
            there = added and {k: torch.tensor(v) for k, v in added.items()}
            theirs = unet(peers.nchw(x), torch.tensor(t), torch.tensor(text), added_cond_kwargs=there).sample
        assert peers.relative(ours[i], peers.nhwc(theirs)[i]) < 1e-4
    plain = flaxdiff.apply(pipe.unet, params["unet"], x, t, text, added)
    assert peers.relative(ours, plain) > 1e-2


def test_freeu_of_a_pipeline():
    pipe, params = load("SD")
    on = pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    by_option = pipe(params, KEY, **TEXT, freeu=(0.9, 0.2, 1.2, 1.4)).images
    np.testing.assert_array_equal(on(params, KEY, **TEXT).images, by_option)
    assert np.abs(on(params, KEY, **TEXT, freeu=(1, 1, 1, 1)).images - pipe(params, KEY, **TEXT).images).max() < 1e-5
    with pytest.raises(ValueError, match="give four numbers"):
        pipe.prepare_inputs(**TEXT | {"output_type": None}, freeu=(1, 2, 3))
    noise, _ = flaxdiff.DDPMPipeline.from_pretrained(peers.saved(peers.ddpm))
    with pytest.raises(ValueError, match="UNet2DModel knows no freeu"):
        noise.prepare_inputs(freeu=(1, 1, 1, 1))


# --- merged tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_merging(ratio):
    """tomesd's own, without its random choice of targets."""
    x, y = normal(2, 48, 5), normal(2, 48, 7)
    there = torch.tensor(x)
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(there, 8, 6, 2, 2, int(48 * ratio), no_rand=True)
    ours, spread = merging(jnp.asarray(x), (6, 8), ratio)
    assert ours(jnp.asarray(y)).shape == merge(torch.tensor(y)).shape  # in no particular order
    np.testing.assert_allclose(spread(ours(jnp.asarray(y))), unmerge(merge(torch.tensor(y))), atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_token_merging_of_a_unet(base):
    """As tomesd patches PyTorch's blocks, at the resolution with most tokens; a share of nothing changes nothing."""
    pipe, params = load(base)
    peer = BASES[base]()
    tomesd.apply_patch(peer, ratio=0.5, use_rand=False, max_downsample=1 if base == "SD" else 2)
    x, t, text = normal(2, 8, 8, 4), np.float32([3, 500]), normal(2, 5, peer.unet.config.cross_attention_dim)
    added = {"text_embeds": normal(2, 24), "time_ids": np.ones((2, 6), np.float32)} if base == "XL" else None
    with torch.no_grad():
        there = added and {k: torch.tensor(v) for k, v in added.items()}
        theirs = peer.unet(peers.nchw(x), torch.tensor(t), torch.tensor(text), added_cond_kwargs=there).sample
    run = lambda share: flaxdiff.apply(pipe.unet.replace(token_merging=share), params["unet"], x, t, text, added)
    assert peers.relative(jax.jit(run, static_argnums=0)(0.5), peers.nhwc(theirs)) < 1e-4
    assert peers.relative(jax.jit(run, static_argnums=0)(0.0), peers.nhwc(theirs)) > 1e-4
    with pytest.raises(ValueError, match="token_merging=0.9"):
        pipe.unet.replace(token_merging=0.9)


# --- from step to step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_the_last_block_of_a_unet(base):
    """On what comes from below at the same time it gives the same, with the factors of FreeU."""
    pipe, params = load(base)
    x, t, text = normal(2, 8, 8, 4), np.float32([3, 500]), normal(2, 5, pipe.unet.config.cross_attention_dim)
    added = {"text_embeds": normal(2, 24), "time_ids": np.ones((2, 6), np.float32)} if base == "XL" else None

    @jax.jit
    def both(params):
        run = functools.partial(flaxdiff.apply, pipe.unet, params, x, t, text, added, freeu=jnp.full((2, 4), 0.7))
        with core.setting_of(core.noted, {"up": []}) as notes:
            whole = run()
        return whole, run(deep=notes["up"][-1]), run(deep=0 * notes["up"][-1])

    whole, last, other = both(params["unet"])
    np.testing.assert_allclose(last, whole, atol=1e-6)
    assert peers.relative(other, whole) > 1e-2


CACHES = {
    "deep_cache": ({"cache_interval": 1}, {"cache_interval": 2}),
    "branch_cache": ({"cache_interval": 1}, {"cache_interval": 2}),
    "tgate": ({"gate_step": 3}, {"gate_step": 1}),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", CACHES)
def test_caches(name, base):
    """With nothing saved the pictures are the same; with something they differ, and no strength compiles anything."""
    pipe, params = load(base)
    plain = pipe(params, KEY, **TEXT).images
    cached = pipe.replace(cache=getattr(caching, name))
    nothing, something = CACHES[name]
    np.testing.assert_allclose(cached(params, KEY, **TEXT, **nothing).images, plain, atol=1e-5)
    compiled = peers.programs()
    saved = cached(params, KEY, **TEXT, **something).images
    assert 1e-3 < np.abs(saved - plain).max() and peers.programs() == compiled
    inputs = cached.prepare_inputs(**{k: v for k, v in TEXT.items() if k != "output_type"}, **something)
    np.testing.assert_allclose(jax.jit(cached.generate)(params, KEY, inputs), saved, atol=1e-5)


def test_caches_save_what_they_say():
    """A network that is asked for one branch, or for its last block, computes that much less."""
    pipe, params = load("SD")
    cost = {}
    for name in (None, *CACHES):
        program = pipe.replace(cache=name and getattr(caching, name)).program
        inputs = pipe.replace(cache=name and getattr(caching, name)).prepare_inputs(prompt="cat")
        conditions, state = jax.eval_shape(program.begin, params, KEY, inputs)
        text = jax.jit(program.step).lower(params, conditions, state).as_text()
        cost[name] = text.count("stablehlo.convolution") + text.count("stablehlo.dot_general")
    assert cost["deep_cache"] < 1.4 * cost[None]
    assert cost["branch_cache"] > 1.6 * cost[None]  # another whole network, of half the batch


# --- all together ----------------------------------------------------------------------------------------------------


def everything(
    guidance_scale=1.0,
    guidance_rescale=0.0,
    apg_scale=1.0,
    apg_eta=1.0,
    pag_scale=0.0,
    layers=Layers(["mid"]),
    sag_scale=0.0,
    start=0.0,
    stop=1.0,
):
    """Each of these rules; at these strengths none does anything."""
    free = interval(start, stop, guidance.cfg(guidance_scale), guidance.apg(apg_scale, apg_eta, threshold=0.0))
    return chain(free, guidance.pag(pag_scale, layers), guidance.sag(sag_scale), guidance.rescale(guidance_rescale))


ONE = {
    "cfg": dict(guidance_scale=4.0),
    "rescale": dict(guidance_scale=4.0, guidance_rescale=0.7),
    "apg": dict(apg_scale=3.0, apg_eta=0.2),
    "pag": dict(pag_scale=2.0),
    "sag": dict(sag_scale=1.5),
    "freeu": dict(freeu=(0.8, 0.5, 1.1, 1.3)),
    "interval": dict(guidance_scale=4.0, start=0.3, stop=0.7),
    "deep cache": dict(cache_interval=2),
}
PAIRS = [*itertools.combinations(ONE, 2)]


@pytest.mark.parametrize("merging", [0.0, 0.5])
@pytest.mark.parametrize("base", [pytest.param("SD"), pytest.param("XL", marks=pytest.mark.slow)])
def test_every_pair(base, merging):
    """Of guidance, FreeU, a cache and merged tokens: in one program, and each does something beside each other."""
    pipe, params = load(base)
    pipe = pipe.replace(guidance=everything, cache=caching.deep_cache, unet=pipe.unet.replace(token_merging=merging))
    neutral = dict(guidance_scale=1.0001, freeu=(1, 1, 1, 1), cache_interval=1)  # more than 1: there is a second branch

    def pictures(*names):
        options = functools.reduce(lambda a, b: a | ONE[b], names, TEXT | neutral)
        return pipe(params, KEY, **options).images

    plain, alone = pictures(), {name: pictures(name) for name in ONE}
    compiled = peers.programs()
    for first, second in PAIRS:
        both = pictures(first, second)
        assert np.isfinite(both).all()
        if {first, second} <= {"cfg", "rescale", "interval"}:  # one of them is the other with something more
            continue
        assert np.abs(both - alone[first]).max() > 1e-5 and np.abs(both - alone[second]).max() > 1e-5, (first, second)
    assert peers.programs() == compiled
    if not merging:
        rule = {"cfg": "standard", "rescale": "standard", "pag": "perturbed", "sag": "self_attention"}
        for name in ("cfg", "rescale", "pag", "sag", "freeu"):
            own = load(base)[0].replace(guidance=getattr(guidance, rule.get(name, "standard")))
            np.testing.assert_allclose(
                own(params, KEY, **TEXT | {"guidance_scale": 1.0001} | ONE[name]).images, alone[name], atol=2e-5
            )
        np.testing.assert_allclose(plain, load(base)[0](params, KEY, **TEXT, guidance_scale=1.0001).images, atol=2e-5)


def test_a_sweep_of_strengths_by_vmap():
    """Strengths are values: one program, mapped over them."""
    pipe, params = load("SD")
    inputs = pipe.prepare_inputs(prompt="cat", num_inference_steps=3)
    with_scale = lambda scale: inputs | {"guidance": inputs["guidance"] | {"guidance_scale": scale}}
    scales = jnp.array([1.5, 4.0, 9.0])
    swept = jax.jit(jax.vmap(lambda scale: pipe.generate(params, KEY, with_scale(scale))))(scales)
    for pictures, scale in zip(swept, scales):
        np.testing.assert_allclose(pictures, jax.jit(pipe.generate)(params, KEY, with_scale(scale)), atol=2e-5)


def test_a_callback_ends_guidance():
    pipe, params = load("SD")
    off = pipe(
        params, KEY, **TEXT, callback_on_step_end=lambda *a: {"guidance_scale": 1.0} if a[1] == 0 else None
    ).images
    rule = pipe.replace(guidance=first_third)
    np.testing.assert_allclose(off, rule(params, KEY, **TEXT).images, atol=1e-5)
    assert np.abs(off - pipe(params, KEY, **TEXT).images).max() > 1e-3


def first_third(guidance_scale):
    return interval(0.0, 0.34, guidance.cfg(guidance_scale))


# --- forecasts -------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module, CacheMixin):
    """Something that hooks may be put on."""


class Network(NamedTuple):
    """One branch, as a cache asks it."""

    y: jax.Array
    index: jax.Array
    branches = ("positive",)

    def __call__(self):
        return caching.Answer({"positive": self.y}, None), {}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_seer(order):
    """diffusers' hook around a layer, whose outputs are a curve that no series of these follows."""
    curve = [np.sin(0.7 * i + np.arange(6.0, dtype=np.float32)).reshape(1, 6) for i in range(14)]
    layer = Layer()
    layer.proj_out = torch.nn.Identity()
    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=2,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    layer.enable_cache(config)
    cache = caching.taylor_seer(cache_interval=3, disable_cache_before_step=2, max_order=order)
    kept = caching.blank(cache, Network(jnp.zeros((1, 6)), jnp.int32(0)))
    run = jax.jit(lambda kept, y, i: caching.evaluate(cache, kept, Network(y, i)))
    exact = []
    for i, y in enumerate(curve):
        with layer.cache_context("one"):
            theirs = layer.proj_out(torch.tensor(y))
        kept = run(kept, y, i)
        np.testing.assert_allclose(kept[0].predictions["positive"], theirs, atol=1e-4)
        exact.append(bool(np.allclose(theirs, y)))
    assert exact == [i < 2 or i % 3 == 0 for i in range(14)]
