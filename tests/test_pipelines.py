"""Whole pipelines against PyTorch's with the same noise, and what holds of all of them."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch

import flaxdiff

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)
TEXT = dict(prompt=["a red dog", "cat"], negative_prompt=["ugly", "ugly"])


def load(build, cls=flaxdiff.DiffusionPipeline, **options):
    """A saved PyTorch pipeline, here and there."""
    pipe, params = cls.from_pretrained(peers.saved(build), **options)
    peer = build()
    peer.set_progress_bar_config(disable=True)
    if getattr(peer, "text_encoder", None) is not None:  # diffusers looks for it where transformers 4 had it
        peer.text_encoder.__dict__["text_model"] = peer.text_encoder
    return pipe.replace(progress=False), params, peer


def compare(pipe, params, peer, options, latents=None, peer_options=None, **ours):
    """Largest difference of the pictures as a share of the largest value."""
    there = {} if latents is None else {"latents": peers.nchw(latents)}
    here = {} if latents is None else {"latents": latents}
    with torch.no_grad():
        theirs = peer(**options, **there, **(peer_options or {}), output_type="np").images
    made = pipe(params, KEY, **options, **here, **ours, output_type="np").images
    return peers.relative(made, theirs, of=type(pipe).__name__)


@pytest.mark.parametrize("build", [peers.stable_diffusion_1, peers.stable_diffusion_2, peers.stable_diffusion_xl])
def test_text_to_image(build):
    pipe, params, peer = load(build)
    assert type(pipe).__name__ == type(peer).__name__
    latents = normal(2, 8, 8, 4)
    plain = dict(TEXT, num_inference_steps=6, guidance_scale=5.0)
    assert compare(pipe, params, peer, plain, latents) < 1e-3
    assert compare(pipe, params, peer, plain | dict(guidance_rescale=0.7, clip_skip=1), latents) < 1e-3
    assert (
        compare(pipe, params, peer, dict(prompt=["cat"] * 2, num_inference_steps=3, guidance_scale=1.0), latents) < 1e-3
    )


def test_one_compiled_step_serves_the_schedulers():
    """Each scheduler against PyTorch's, noise of the solver included."""
    pipe, params, peer = load(peers.stable_diffusion_1)
    latents, noise, config = normal(2, 8, 8, 4), normal(12, 2, 8, 8, 4), peers.saved_config(peers.stable_diffusion_1)
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"):
        peer.scheduler = getattr(diffusers, name).from_config(config)
        ours = pipe.replace(scheduler=getattr(flaxdiff, name).from_config(pipe.scheduler))
        options = dict(TEXT, num_inference_steps=7, guidance_scale=4.0)
        assert compare(ours, params, peer, options, latents) < 1e-3, name
    # A solver that draws noise: hand both the same, through the callback there is for it.
    name = "EulerAncestralDiscreteScheduler"
    peer.scheduler = getattr(diffusers, name).from_config(config)
    ours = pipe.replace(scheduler=getattr(flaxdiff, name).from_config(pipe.scheduler))
    inputs = ours.prepare_inputs(**TEXT, num_inference_steps=7, guidance_scale=4.0, latents=latents)
    made = peers.with_noise(ours, params, inputs, noise)
    draws = iter(noise)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        module = diffusers.schedulers.scheduling_euler_ancestral_discrete
        patch.setattr(module, "randn_tensor", lambda *a, **k: peers.nchw(next(draws)))
        theirs = peer(**TEXT, num_inference_steps=7, guidance_scale=4.0, latents=peers.nchw(latents), output_type="np")
    assert peers.relative(made, theirs.images) < 1e-3


def test_sdxl_sizes():
    """Every micro-condition. One picture, because PyTorch's pairs negative sizes with the wrong rows of a batch."""
    pipe, params, peer = load(peers.stable_diffusion_xl)
    options = dict(
        prompt="a red dog",
        prompt_2="blue",
        negative_prompt="ugly",
        negative_prompt_2="bad",
        num_inference_steps=4,
        original_size=(32, 40),
        crops_coords_top_left=(2, 3),
        target_size=(20, 24),
        negative_original_size=(8, 9),
        negative_crops_coords_top_left=(1, 1),
        negative_target_size=(10, 11),
    )
    assert compare(pipe, params, peer, options, normal(1, 8, 8, 4)) < 1e-3


def test_sdxl_without_a_negative_prompt_is_not_an_empty_one():
    pipe, params, peer = load(peers.stable_diffusion_xl)
    assert pipe.force_zeros_for_empty_prompt
    options = dict(prompt="a red dog", num_inference_steps=4)
    latents = normal(1, 8, 8, 4)
    assert compare(pipe, params, peer, options, latents) < 1e-3
    absent, empty = (
        pipe(params, KEY, **options, latents=latents, output_type="np", **more).images
        for more in ({}, {"negative_prompt": ""})
    )
    assert np.abs(absent - empty).max() > 1e-4


def test_refiner_takes_over():
    """The base stops at 60 %, the refiner goes on from there, and both agree with PyTorch's."""
    base, base_params, base_peer = load(peers.stable_diffusion_xl)
    refiner, refiner_params, refiner_peer = load(peers.stable_diffusion_xl_refiner)
    assert type(refiner).__name__ == "StableDiffusionXLImg2ImgPipeline"
    latents = normal(2, 8, 8, 4)
    text = dict(prompt=TEXT["prompt"], num_inference_steps=10)
    ours = base(base_params, KEY, **text, denoising_end=0.6, latents=latents, output_type="latent").images
    with torch.no_grad():
        theirs = base_peer(**text, denoising_end=0.6, latents=peers.nchw(latents), output_type="latent").images
        final = refiner_peer(**text, denoising_start=0.6, image=theirs, output_type="np").images
    assert peers.relative(ours, peers.nhwc(theirs)) < 1e-3
    refined = refiner(refiner_params, KEY, **text, denoising_start=0.6, image=ours, output_type="np").images
    assert peers.relative(refined, final, of=type(refiner).__name__) < 1e-3


@pytest.mark.parametrize("start", ["pixels", "latents"])
def test_image_to_image(start, monkeypatch):
    pipe, params, _ = load(peers.stable_diffusion_1, flaxdiff.StableDiffusionImg2ImgPipeline)
    pipe = pipe.replace(scheduler=flaxdiff.DDIMScheduler.from_config(pipe.scheduler))
    parts = peers.stable_diffusion_1().components
    peer = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    noise = normal(1, 8, 8, 4)
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: peers.nchw(noise))
    options = dict(prompt="cat", num_inference_steps=8, strength=0.5)
    if start == "latents":
        image = normal(1, 8, 8, 4)
        there = peers.nchw(image)
    else:
        image = rng.uniform(size=(1, 16, 16, 3)).astype(np.float32)
        there = peers.nchw(image)
        # The posterior's spread: PyTorch draws it from its own generator, here the key; at no spread both are the mean.
        for tree in (params["vae"],):
            tree["quant_conv.bias"] = tree["quant_conv.bias"].at[4:].add(-60)
        with torch.no_grad():
            peer.vae.quant_conv.bias[4:] -= 60
    with torch.no_grad():
        theirs = peer(**options, image=there, output_type="np").images
    ours = pipe(params, KEY, **options, image=image, latents=noise, output_type="np").images
    assert peers.relative(ours, theirs, of=type(pipe).__name__) < 1e-3


@pytest.mark.parametrize(("name", "options"), [("DDPM", {}), ("DDIM", {"eta": 0.0}), ("DDIM", {"eta": 0.7})])
def test_unconditional(name, options, monkeypatch):
    pipe, params, peer = load(peers.ddpm, getattr(flaxdiff, f"{name}Pipeline"))
    pipe = pipe.replace(scheduler=getattr(flaxdiff, f"{name}Scheduler").from_config(pipe.scheduler))
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(peer.scheduler.config)
    peer = getattr(diffusers, f"{name}Pipeline")(peer.unet, scheduler)
    peer.set_progress_bar_config(disable=True)
    draws = [normal(2, 8, 8, 3) for _ in range(7)]
    queue = iter(draws)
    for module in (
        f"pipelines.{name.lower()}.pipeline_{name.lower()}",
        f"schedulers.scheduling_{name.lower()}",
    ):
        target = __import__(f"diffusers.{module}", fromlist=["randn_tensor"])
        monkeypatch.setattr(target, "randn_tensor", lambda *a, **k: peers.nchw(next(queue)))
    with torch.no_grad():
        theirs = peer(batch_size=2, num_inference_steps=6, output_type="np", **options).images
    inputs = pipe.prepare_inputs(batch_size=2, num_inference_steps=6, latents=draws[0], **options)
    made = peers.with_noise(pipe, params, inputs, draws[1:])
    assert peers.relative(made, theirs, of=type(pipe).__name__) < 1e-3


# --- one program -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """A tiny pipeline with its parameters."""
    pipe, params, _ = load(peers.stable_diffusion_1)
    return pipe, params


def test_nothing_recompiles(tiny):
    """Scheduler, steps, strength of guidance, prompt, seed and skipped layers are values."""
    pipe, params = tiny
    generate, count = jax.jit(pipe.generate), [0]
    variations = [
        (dict(), "PNDMScheduler"),
        (dict(num_inference_steps=9), "DDIMScheduler"),
        (dict(guidance_scale=2.0, guidance_rescale=0.5), "EulerDiscreteScheduler"),
        (dict(prompt=["one", "two"], clip_skip=1), "DPMSolverMultistepScheduler"),
        (dict(num_inference_steps=1), "EulerAncestralDiscreteScheduler"),
        (dict(num_inference_steps=64), "DDPMScheduler"),
    ]

    def listen(event: str, duration: float, **kwargs):
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    pictures = []
    for i, (options, name) in enumerate(variations):
        swapped = pipe.replace(scheduler=getattr(flaxdiff, name).from_config(pipe.scheduler))
        assert swapped.generate == pipe.generate
        inputs = swapped.prepare_inputs(**(TEXT | dict(num_inference_steps=5) | options))
        if i == 1:
            jax.monitoring.register_event_duration_secs_listener(listen)
        pictures.append(generate(params, jax.random.key(i), inputs))
    assert generate._cache_size() == 1
    compiled = count[0]
    jax.jit(lambda x: x * 3.5 + 1)(1.0).block_until_ready()
    assert count[0] > compiled  # the listener works
    assert compiled == 0
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(pictures, pictures[1:]))


def test_calls_do_not_recompile(tiny):

    pipe, params = tiny
    pipe(params, KEY, **TEXT, num_inference_steps=2)
    sizes = peers.programs()
    other = pipe.replace(scheduler=flaxdiff.DDIMScheduler.from_config(pipe.scheduler))
    other(params, jax.random.key(1), prompt=["x", "y"], num_inference_steps=3, guidance_scale=3.0)
    assert peers.programs() == sizes


def test_generate_is_what_a_call_does(tiny):
    pipe, params = tiny
    options = dict(TEXT, num_inference_steps=4)
    called = pipe(params, KEY, **options, output_type="np").images
    generated = jax.jit(pipe.generate)(params, KEY, pipe.prepare_inputs(**options))
    np.testing.assert_allclose(called, generated, atol=2e-6)
    assert called.shape == (2, 16, 16, 3) and 0 <= called.min() and called.max() <= 1


def test_an_image_has_its_own_key(tiny):
    """A picture that pleased among several is made again alone, by its key."""
    pipe, params = tiny
    keys = jax.random.split(KEY, 4)
    sampler = pipe.replace(scheduler=flaxdiff.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler))
    options = dict(num_inference_steps=3, output_type="np")
    four = sampler(params, keys, prompt=["cat"] * 4, **options).images
    alone = sampler(params, keys[2:3], prompt="cat", **options).images
    np.testing.assert_allclose(four[2:3], alone, atol=2e-6)
    many = sampler(params, KEY, prompt="cat", num_images_per_prompt=3, **options).images
    fewer = sampler(params, KEY, prompt="cat", num_images_per_prompt=2, **options).images
    np.testing.assert_allclose(many[:2], fewer, atol=2e-6)
    assert np.abs(many[0] - many[1]).max() > 1e-3


def test_embeddings_in_place_of_a_prompt(tiny):
    pipe, params = tiny
    inputs = pipe.prepare_inputs(**TEXT)
    embed = lambda ids: flaxdiff.apply(pipe.text_encoder, params["text_encoder"], ids).last_hidden_state
    options = dict(num_inference_steps=3, output_type="np")
    texts = pipe(params, KEY, **TEXT, **options).images
    embeds = pipe(
        params,
        KEY,
        prompt_embeds=embed(inputs["prompt_ids"]),
        negative_prompt_embeds=embed(inputs["negative_prompt_ids"]),
        **options,
    ).images
    np.testing.assert_allclose(texts, embeds, atol=2e-6)


def test_callback_sees_and_changes_latents(tiny):
    pipe, params = tiny
    seen = []

    def halve(pipe, step, timestep, told):
        seen.append((step, timestep, told["latents"].shape))
        return {"latents": told["latents"] / 2} if step == 1 else None

    options = dict(prompt="cat", num_inference_steps=4, output_type="np")
    changed = pipe(params, KEY, **options, callback_on_step_end=halve).images
    assert [s for s, _, _ in seen] == list(range(5))  # PNDM asks once more than it steps
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
    assert all(shape == (1, 8, 8, 4) for _, _, shape in seen)
    assert np.abs(changed - pipe(params, KEY, **options).images).max() > 1e-3


def test_output_types(tiny):
    pipe, params = tiny
    options = dict(prompt="cat", num_inference_steps=2)
    latents = pipe(params, KEY, **options, output_type="latent").images
    array = pipe(params, KEY, **options, output_type="np").images
    picture = pipe(params, KEY, **options).images[0]
    assert latents.shape == (1, 8, 8, 4)
    np.testing.assert_allclose(pipe.program.decode(params, latents), array, atol=1e-6)
    np.testing.assert_allclose(np.asarray(picture) / 255, array[0], atol=0.5 / 255 + 1e-6)


def test_slices_make_the_same_picture(tiny):
    pipe, params = tiny
    options = dict(prompt="cat", num_inference_steps=2, output_type="np")
    sliced = pipe.enable_attention_slicing()
    assert sliced.unet.config.attention == "sliced" and pipe.unet.config.attention == "auto"
    np.testing.assert_allclose(sliced(params, KEY, **options).images, pipe(params, KEY, **options).images, atol=2e-6)


# --- transformations and devices -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vmap_over_keys(tiny):
    pipe, params = tiny
    inputs, keys = pipe.prepare_inputs(prompt="cat", num_inference_steps=3), jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(lambda key: pipe.generate(params, key, inputs)))(keys)
    assert together.shape == (3, 1, 16, 16, 3)
    np.testing.assert_allclose(together[1], jax.jit(pipe.generate)(params, keys[1], inputs), atol=5e-6)


def test_gradient_of_the_picture(tiny):
    """By the prompt's embeddings, against a finite difference."""
    pipe, params = tiny
    embeds, direction = jnp.asarray(normal(1, 16, 16)), jnp.asarray(normal(1, 16, 16))
    pipe = pipe.replace(scheduler=flaxdiff.DDIMScheduler.from_config(pipe.scheduler))
    inputs = pipe.prepare_inputs(prompt_embeds=embeds, num_inference_steps=3, guidance_scale=1.0)
    weights = jnp.asarray(normal(1, 16, 16, 3))
    score = lambda e: jnp.vdot(pipe.generate(params, KEY, {**inputs, "prompt_embeds": e}), weights)
    slope = jnp.vdot(jax.jit(jax.grad(score))(embeds), direction)
    run, h = jax.jit(score), 0.01
    finite = (run(embeds + h * direction) - run(embeds - h * direction)) / (2 * h)
    assert abs(slope - finite) < 0.05 * abs(finite) and abs(slope) > 0


@pytest.mark.slow
def test_pmap(tiny):
    pipe, params = tiny
    inputs = pipe.prepare_inputs(prompt=["a", "b", "c", "d"], num_inference_steps=3)
    devices = jax.devices()[:2]
    one = jax.jit(pipe.generate)(params, KEY, inputs)
    two = jax.pmap(pipe.generate, devices=devices)(
        flaxdiff.replicate(params, 2), flaxdiff.replicate(KEY, 2), flaxdiff.shard(inputs, 2)
    )
    assert two.shape == (2, 2, 16, 16, 3)
    np.testing.assert_allclose(two.reshape(one.shape), one, atol=1e-5)


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2},
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        {"data": 2, "fsdp": 4},
        {"fsdp": 2, "tensor": 4},
    ],
)
def test_one_key_one_picture_on_any_number_of_devices(tiny, axes):
    """Batch and parameters sharded over fake devices, noise of the solver included."""
    pipe, params = tiny
    pipe = pipe.replace(scheduler=flaxdiff.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler))
    inputs = pipe.prepare_inputs(prompt=[*"abcdefgh"], num_inference_steps=3)
    one = jax.jit(pipe.generate)(params, KEY, inputs)
    mesh = flaxdiff.make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    spread = flaxdiff.distribute(params, mesh)
    if "fsdp" in axes:
        assert not spread["unet"]["conv_in.weight"].sharding.is_fully_replicated
    many = jax.jit(pipe.generate)(spread, KEY, flaxdiff.shard(inputs, mesh))
    np.testing.assert_allclose(many, one, atol=1e-5)


# --- what a pipeline refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(prompt="cat", height=15),
            ValueError,
            "height=15, width=16: .* multiples of 2; the nearest are 16 and 16",
        ),
        (dict(prompt=[]), ValueError, "empty list of prompts"),
        (dict(), ValueError, "needs a prompt or prompt_embeds, and was given neither"),
        (dict(prompt="cat", prompt_embeds=np.zeros((1, 16, 16))), ValueError, "was given both"),
        (dict(prompt=["cat", 3]), ValueError, "prompts are texts, but 3 is a int"),
        (dict(prompt="cat", num_inference_steps=0), ValueError, "num_inference_steps=0"),
        (dict(prompt="cat", num_images_per_prompt=0), ValueError, "ask for at least one"),
        (dict(prompt="cat", etta=1.0), ValueError, "'etta'"),
        (dict(prompt=["a", "b"], negative_prompt=["x", "y", "z"]), ValueError, "3 entries|2 entries"),
        (
            dict(prompt="cat", latents=np.zeros((1, 9, 8, 4))),
            ValueError,
            r"latents have shape \(1, 9, 8, 4\); expected .*\(8, 8, 4\)",
        ),
    ],
)
def test_bad_input(tiny, options, error, message):
    pipe, _ = tiny
    with pytest.raises(error, match=message):
        pipe.prepare_inputs(**options)


def test_bad_call(tiny):
    pipe, params = tiny
    with pytest.raises(ValueError, match="output_type='jpeg' is not known"):
        pipe(params, KEY, prompt="cat", output_type="jpeg")
    with pytest.raises(ValueError, match=r"keys of shape \(3,\) for 2 images"):
        pipe(params, jax.random.split(KEY, 3), prompt=["a", "b"])
    with pytest.raises(TypeError, match="has no part .*unnet"):
        pipe.replace(unnet=None)
    with pytest.raises(AttributeError, match="has no 'image_encoder'"):
        _ = pipe.image_encoder


def test_long_prompt_is_cut_with_a_warning(tiny):
    pipe, _ = tiny
    with pytest.warns(UserWarning, match="longer than 16 tokens"):
        pipe.prepare_inputs(prompt="a very long prompt " * 5)


def test_a_batch_must_divide():
    with pytest.raises(ValueError, match="A batch of 3 does not divide among 2 devices"):
        flaxdiff.shard({"ids": np.zeros((3, 7))}, 2)
    with pytest.raises(ValueError, match="does not hold 8 devices"):
        flaxdiff.make_mesh({"data": 3})
