"""The calls of diffusers' removed Flax classes: its documentation's snippets, and that they are the pipeline itself.

The snippets are those of the JAX/Flax guide, of the page on schedulers and of three training pages, with another import
line and another folder.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.jax_utils import replicate
from flax.training.common_utils import shard
from jax import pmap
from PIL import Image

import flaxdiff
from flaxdiff import FlaxStableDiffusionPipeline, make_image_grid
from flaxdiff.pipelines.text import Tokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SMALL = {"norm_num_groups": 8, "layers_per_block": 1}
SCHEDULERS = [
    "FlaxDDIMScheduler",
    "FlaxDDPMScheduler",
    "FlaxDPMSolverMultistepScheduler",
    "FlaxEulerDiscreteScheduler",
    "FlaxLMSDiscreteScheduler",
    "FlaxPNDMScheduler",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Stable Diffusion that reads 77 tokens, as the real one does, with random weights."""
    root = tmp_path_factory.mktemp("tiny")
    shutil.copytree(flaxdiff.EMOJI / "tokenizer", root / "tokenizer")
    settings = root / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 77}))
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 3072, "bos_token_id": 3070, "eos_token_id": 3071}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    crossed = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    crossed |= {"cross_attention_dim": 16, "attention_head_dim": 2, "sample_size": 8}
    specs = {
        "text_encoder": flaxdiff.CLIPTextModel.from_config(text | ids),
        "unet": flaxdiff.UNet2DConditionModel.from_config(SMALL | crossed | {"block_out_channels": [16]}),
        "vae": flaxdiff.AutoencoderKL.from_config(SMALL | blocks | {"block_out_channels": [16, 32]}),
    }
    pipe = flaxdiff.StableDiffusionPipeline(
        specs=tuple(specs.items()),
        scheduler=flaxdiff.PNDMScheduler(**BETAS, skip_prk_steps=True),
        tokenizers=(("tokenizer", Tokenizer(str(root / "tokenizer"), "CLIPTokenizer")),),
    )
    normal = lambda shape: 0.2 * np.random.default_rng(0).standard_normal(shape.shape).astype(np.float32)
    params = {name: jax.tree.map(normal, flaxdiff.abstract(spec)) for name, spec in specs.items()}
    flaxdiff.save(root / "pipeline", pipe, params)
    return root / "pipeline"


@pytest.fixture(scope="module")
def loaded(folder):
    return FlaxStableDiffusionPipeline.from_pretrained(folder, dtype=jnp.float32)


def expected(pipeline, params, key, prompts, **options):
    """The pipeline's own pictures of the same key, always with both branches, as the Flax class had them."""
    options = {"negative_prompt": "", "num_inference_steps": 3, "guidance_scale": 7.5} | options
    pipe = pipeline.pipe.replace(scheduler=options.pop("scheduler", pipeline.pipe.scheduler))
    return jax.jit(pipe.generate)(params, key, pipe.prepare_inputs(prompt=prompts, **options))


# --- the documentation's snippets ------------------------------------------------------------------------------------


def test_guide(folder):
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(
        folder,
        variant="bf16",
        dtype=jnp.bfloat16,
    )
    prompt = (
        "A cinematic film still of Morgan Freeman starring as Jimi Hendrix, portrait, 40mm lens, shallow depth of field"
    )
    prompt = [prompt] * jax.device_count()
    prompt_ids = pipeline.prepare_inputs(prompt)
    assert prompt_ids.shape == (8, 77)

    # parameters
    p_params = replicate(params)
    # arrays
    prompt_ids = shard(prompt_ids)
    assert prompt_ids.shape == (8, 1, 77)

    def create_key(seed=0):
        return jax.random.PRNGKey(seed)

    rng = create_key(0)
    rng = jax.random.split(rng, jax.device_count())

    images = pipeline(prompt_ids, p_params, rng, jit=True)[0]
    assert images.shape == (8, 1, 16, 16, 3)
    same_prompt = images

    images = images.reshape((images.shape[0] * images.shape[1],) + images.shape[-3:])
    images = pipeline.numpy_to_pil(images)
    assert make_image_grid(images, rows=2, cols=4).size == (64, 32)

    prompts = [
        "Labrador in the style of Hokusai",
        "Painting of a squirrel skating in New York",
        "HAL-9000 in the style of Van Gogh",
        "Times Square under water, with fish and a dolphin swimming around",
        "Ancient Roman fresco showing a man working on his laptop",
        "Close-up photograph of young black woman against urban background, high quality, bokeh",
        "Armchair in the shape of an avocado",
        "Clown astronaut in space, with Earth in the background",
    ]
    prompt_ids = pipeline.prepare_inputs(prompts)
    prompt_ids = shard(prompt_ids)
    images = pipeline(prompt_ids, p_params, rng, jit=True).images
    assert not np.allclose(images, same_prompt)

    p_generate = pmap(pipeline._generate)
    again = p_generate(prompt_ids, p_params, rng)
    again = again.block_until_ready()
    assert again.shape == (8, 1, 16, 16, 3)
    np.testing.assert_allclose(again, images, atol=1e-5)


def test_schedulers_page(folder):
    from flaxdiff import FlaxDPMSolverMultistepScheduler

    scheduler, scheduler_state = FlaxDPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(
        folder,
        scheduler=scheduler,
        variant="bf16",
        dtype=jax.numpy.float32,
    )
    params["scheduler"] = scheduler_state
    weights = params

    prompt = "A photograph of an astronaut riding a horse on Mars, high resolution, high definition."
    num_samples = jax.device_count()
    prompt_ids = pipeline.prepare_inputs([prompt] * num_samples)

    prng_seed = jax.random.PRNGKey(0)
    num_inference_steps = 25

    # shard inputs and rng
    params = replicate(params)
    prng_seed = jax.random.split(prng_seed, jax.device_count())
    prompt_ids = shard(prompt_ids)

    images = pipeline(prompt_ids, params, prng_seed, num_inference_steps, jit=True).images
    theirs = expected(pipeline, weights, prng_seed[3], [prompt], num_inference_steps=25, scheduler=scheduler)
    np.testing.assert_allclose(images[3], theirs, atol=1e-5)
    images = pipeline.numpy_to_pil(np.asarray(images.reshape((num_samples,) + images.shape[-3:])))
    assert len(images) == 8 and all(image.size == (16, 16) for image in images)


@pytest.mark.parametrize("prompt", ["A <cat-toy> train", "yoda naruto", "A photo of sks dog in a bucket"])
def test_training_pages(prompt, folder, tmp_path):
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(folder, dtype=jax.numpy.bfloat16)

    prng_seed = jax.random.PRNGKey(0)
    num_inference_steps = 50

    num_samples = jax.device_count()
    prompt = num_samples * [prompt]
    prompt_ids = pipeline.prepare_inputs(prompt)

    # shard inputs and rng
    params = replicate(params)
    prng_seed = jax.random.split(prng_seed, jax.device_count())
    prompt_ids = shard(prompt_ids)

    images = pipeline(prompt_ids, params, prng_seed, num_inference_steps, jit=True).images
    images = pipeline.numpy_to_pil(np.asarray(images.reshape((num_samples,) + images.shape[-3:])))
    images[0].save(tmp_path / "cat-train.png")
    assert Image.open(tmp_path / "cat-train.png").size == (16, 16)


# --- it is the pipeline ----------------------------------------------------------------------------------------------


def test_equals_the_pipeline_on_each_device(loaded):
    """Two images a device, a device at a time, on the same keys; replicated and split by our own functions."""
    pipeline, params = loaded
    prompts = [f"red {i}" for i in range(16)]
    keys = jax.random.split(jax.random.PRNGKey(1), 8)
    ids = flaxdiff.shard(pipeline.prepare_inputs(prompts))
    assert ids.shape == (8, 2, 77)
    images = pipeline(ids, flaxdiff.replicate(params), keys, 3, jit=True).images
    assert images.shape == (8, 2, 16, 16, 3) and images.dtype == np.float32
    for d in range(8):
        np.testing.assert_allclose(images[d], expected(pipeline, params, keys[d], prompts[2 * d :][:2]), atol=1e-5)
    assert np.abs(images[0] - images[1]).max() > 1e-3


def test_equals_the_pipeline_on_one_device(loaded):
    pipeline, params = loaded
    ids = pipeline.prepare_inputs(["red dog", "cat"])
    for key in (jax.random.PRNGKey(2), jax.random.key(2), jax.random.split(jax.random.PRNGKey(2))):
        images = pipeline(ids, params, key, 3).images
        assert images.shape == (2, 16, 16, 3)
        np.testing.assert_allclose(images, expected(pipeline, params, key, ["red dog", "cat"]), atol=1e-5)
    output = pipeline(ids, params, key, 3, return_dict=False)
    assert type(output) is tuple and output[1] is False
    np.testing.assert_array_equal(output[0], images)


def test_arguments(loaded):
    """Size, strength, negative prompt and latents arrive, on one device, on eight, and through `_generate`."""
    pipeline, params = loaded
    key, prompts = jax.random.PRNGKey(3), ["red dog", "cat"]
    ids, bad = (pipeline.prepare_inputs(texts) for texts in (prompts, ["ugly", "blue"]))
    latents = np.random.default_rng(0).standard_normal((2, 4, 12, 8)).astype(np.float32)
    theirs = expected(
        pipeline,
        params,
        key,
        prompts,
        height=24,
        width=16,
        guidance_scale=[0.5, 3.0],
        negative_prompt=["ugly", "blue"],
        latents=latents.transpose(0, 2, 3, 1),
    )
    strengths = np.array([0.5, 3.0], np.float32)
    images = pipeline(ids, params, key, 3, 24, 16, strengths, latents, bad).images
    assert images.shape == (2, 24, 16, 3)
    np.testing.assert_allclose(images, theirs, atol=1e-5)

    many = lambda a: np.stack([a] * 8)
    arrays = [many(a) for a in (strengths, latents, bad)]
    p_params, keys = replicate(params), many(np.asarray(key))
    np.testing.assert_allclose(
        pipeline(many(ids), p_params, keys, 3, 24, 16, *arrays, jit=True).images, many(theirs), atol=1e-5
    )
    p_generate = pmap(pipeline._generate, static_broadcasted_argnums=(3, 4, 5))
    np.testing.assert_allclose(p_generate(many(ids), p_params, keys, 3, 24, 16, *arrays), many(theirs), atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_in_params(name, folder, loaded):
    """The state decides, whatever scheduler the pipeline was loaded with."""
    pipeline, params = loaded
    scheduler, state = getattr(flaxdiff, name).from_pretrained(folder, subfolder="scheduler")
    assert "Flax" + type(scheduler).__name__ == name and scheduler.beta_end == 0.012
    key, ids = jax.random.PRNGKey(4), pipeline.prepare_inputs("cat")
    images = pipeline(ids, params | {"scheduler": state}, key, 5).images
    theirs = expected(pipeline, params, key, "cat", num_inference_steps=5, scheduler=scheduler)
    np.testing.assert_allclose(images, theirs, atol=1e-5)
    other = pipeline(ids, params, key, 5).images
    assert (np.abs(images - other).max() > 1e-4) == (name != "FlaxPNDMScheduler")


def test_swapping_compiles_nothing(folder, loaded):
    """Scheduler, number of steps, strength and prompts are values of one program, on one device as on eight."""
    pipeline, params = loaded
    ids = shard(pipeline.prepare_inputs(["cat"] * 8))
    key = jax.random.PRNGKey(0)
    p_params, keys = replicate(params), jax.random.split(key, 8)
    calls = [lambda p, *more: pipeline(ids, p_params | p, keys, *more, jit=True).images]
    calls.append(lambda p, *more: pipeline(ids[0], params | p, key, *more).images)
    states = [getattr(flaxdiff, name).from_pretrained(folder, "scheduler")[1] for name in SCHEDULERS]
    before = [call({"scheduler": states[0]}, 4) for call in calls]
    compiled = []

    def listen(event: str, duration: float, **kwargs):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    after = [call({"scheduler": state}, 5, None, None, 2.0) for state in states[1:] for call in calls]
    events = [event for event in compiled if event.endswith("backend_compile_duration")]
    jax.jit(lambda x: x * 2.5 + 3)(1.0).block_until_ready()
    assert any(event.endswith("backend_compile_duration") for event in compiled)  # the listener works
    assert events == []
    assert np.abs(after[0] - before[0]).max() > 1e-4


def test_numpy_to_pil(loaded):
    pipeline, _ = loaded
    for images in (np.full((8, 4, 3), 0.5), jnp.full((1, 8, 4, 3), 0.5)):
        (image,) = pipeline.numpy_to_pil(images)
        assert image.size == (4, 8) and image.getpixel((0, 0)) == (128, 128, 128)


# --- loading, and what goes wrong ------------------------------------------------------------------------------------


def test_loading_as_before(folder):
    """What scripts for the Flax class give is taken: a revision, a variant that is not there, no safety checker."""
    options = {"revision": "bf16", "variant": "bf16", "safety_checker": None, "feature_extractor": None}
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(str(folder), dtype=jnp.bfloat16, **options)
    assert sorted(params) == ["scheduler", "text_encoder", "unet", "vae"]
    assert params["unet"]["conv_in.weight"].dtype == jnp.bfloat16
    assert hash(pipeline) == hash(FlaxStableDiffusionPipeline.from_pretrained(folder)[0])
    with pytest.raises(FileNotFoundError, match="no/such"):
        FlaxStableDiffusionPipeline.from_pretrained("no/such/folder", variant="bf16")


def test_a_variant_that_is_there(folder, tmp_path):
    pipe, params = flaxdiff.load(folder, dtype=jnp.float32)
    doubled = {name: {k: 2 * v for k, v in weights.items()} for name, weights in params.items()}
    flaxdiff.save(tmp_path / "both", pipe, params)
    flaxdiff.save(tmp_path / "both", pipe, doubled, variant="bf16", dtype=jnp.bfloat16)
    name = "conv_in.bias"
    for variant, weights in (("bf16", doubled), ("fp16", params), (None, params)):
        _, found = FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "both", variant=variant, dtype=jnp.float32)
        np.testing.assert_allclose(found["unet"][name], weights["unet"][name], rtol=0.01)


def test_refusals(loaded):
    pipeline, params = loaded
    ids, key = pipeline.prepare_inputs(["cat"] * 8), jax.random.PRNGKey(0)
    keys, p_params = jax.random.split(key, 8), replicate(params)

    def refused(message, *args, **options):
        with pytest.raises(ValueError, match=message):
            pipeline(*args, num_inference_steps=2, **options)

    refused(r"shape \(8, 77\); expected \[devices, B, N\]", ids, p_params, keys, jit=True)
    refused(r"shape \(8, 1, 77\); expected \[B, N\], or jit=True", shard(ids), params, key)
    refused(r"shape \(2,\); 8 devices need a key each", shard(ids), p_params, key, jit=True)
    refused(r"shape \(4, 2\); 8 devices need a key each", shard(ids), p_params, keys[:4], jit=True)
    refused(r"shape \(\); 8 devices need a key each", shard(ids), p_params, jax.random.key(0), jit=True)
    refused(r"give replicate\(params\)", shard(ids), params, keys, jit=True)
    refused(r"give replicate\(params\)", ids[:6].reshape(6, 1, 77), p_params, keys[:6], jit=True)
    refused(r"neg_prompt_ids have shape \(3, 77\); expected \(8, 77\)", ids, params, key, neg_prompt_ids=ids[:3])
    refused(r"prompt_ids have shape \(8, 5\); expected \(8, 77\)", ids[:, :5], params, key)
    refused(
        r"latents have shape \(8, 8, 8, 4\); expected \(8, 4, 8, 8\)", ids, params, key, latents=np.ones((8, 8, 8, 4))
    )
    refused("the nearest are 16 and 16", ids, params, key, height=17, width=16)
    refused("put a state there", ids, {k: v for k, v in params.items() if k != "scheduler"}, key)
    with pytest.raises(ValueError, match="prompts are texts, but 3 is a int"):
        pipeline.prepare_inputs(["cat", 3])
    with pytest.raises(ValueError, match="batch of 7 does not divide"):
        flaxdiff.shard(ids[:7])


# --- other tasks, and networks ---------------------------------------------------------------------------------------


def close(pipeline, params, call, given, theirs):
    """A call on one device, and the same on eight, make what the pipeline makes."""
    np.testing.assert_allclose(call(given, params, jax.random.PRNGKey(5), jit=False), theirs, atol=1e-5)
    many = lambda a: np.stack([a] * 8)
    args = [many(a) for a in given], replicate(params), many(np.asarray(jax.random.PRNGKey(5)))
    np.testing.assert_allclose(call(*args, jit=True), many(theirs), atol=1e-5)


PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 16, 3), np.uint8))
TWO = dict(prompt=["red dog", "cat"], num_inference_steps=3, guidance_scale=7.5, output_type="np")


def test_image_to_image(folder):
    pipeline, params = flaxdiff.FlaxStableDiffusionImg2ImgPipeline.from_pretrained(folder)
    ids, image = pipeline.prepare_inputs(TWO["prompt"], [PICTURE] * 2)
    assert ids.shape == (2, 77) and image.shape == (2, 3, 16, 16)
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    options = dict(strength=0.6, latents=noise.transpose(0, 2, 3, 1), image=[PICTURE] * 2)
    theirs = pipeline.pipe(params, jax.random.PRNGKey(5), **TWO | options).images

    def call(given, params, key, jit):
        return pipeline(*given[:2], params, key, 0.6, 3, noise=given[2], jit=jit).images

    close(pipeline, params, call, [ids, image, noise], theirs)
    with pytest.raises(ValueError, match=r"image have shape \(2, 16, 16, 3\); expected \(2, 3, 3, 16\)|divi|nearest"):
        pipeline(ids, np.moveaxis(image, 1, -1), params, jax.random.PRNGKey(5))


def test_inpainting(folder):
    root, spec = folder.parent / "nine", flaxdiff.UNet2DConditionModel.from_pretrained(folder / "unet")[0]
    spec = spec.replace(in_channels=9)
    unet = spec, flaxdiff.init(spec, jax.random.key(0))
    pipe, params = flaxdiff.StableDiffusionInpaintPipeline.from_pretrained(folder, unet=unet)
    flaxdiff.save(root, pipe, params)
    pipeline, params = flaxdiff.FlaxDiffusionPipeline.from_pretrained(root)
    assert type(pipeline) is flaxdiff.FlaxStableDiffusionInpaintPipeline
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 2, 12, 9))
    ids, masked, small = pipeline.prepare_inputs(TWO["prompt"], [PICTURE] * 2, [mask] * 2)
    assert masked.shape == (2, 3, 16, 16) and small.shape == (2, 1, 16, 16)
    options = dict(image=[PICTURE] * 2, mask_image=[mask] * 2, height=16, width=16)
    theirs = pipeline.pipe(params, jax.random.PRNGKey(5), **TWO | options).images

    def call(given, params, key, jit):
        return pipeline(given[0], given[2], given[1], params, key, 3, jit=jit).images

    close(pipeline, params, call, [ids, masked, small], theirs)
    four, params = flaxdiff.FlaxStableDiffusionInpaintPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="4 channels of the sample and 5 beside it, but it takes 4"):
        four(ids, small, masked, params, jax.random.PRNGKey(5))


def test_controlnet(folder, tmp_path):
    spec, weights = flaxdiff.UNet2DConditionModel.from_pretrained(folder / "unet")
    options = dict(conditioning_embedding_out_channels=(8, 16))
    net, own = flaxdiff.ControlNetModel.from_unet(spec, weights, jax.random.key(0), **options)
    flaxdiff.save(tmp_path, net, jax.tree.map(lambda a: a + 0.01, own))
    controlnet, own = flaxdiff.FlaxControlNetModel.from_pretrained(tmp_path, from_pt=True, dtype=jnp.float32)
    loader = flaxdiff.FlaxStableDiffusionControlNetPipeline.from_pretrained
    pipeline, params = loader(folder, controlnet=controlnet)
    ids, image = pipeline.prepare_text_inputs(TWO["prompt"]), pipeline.prepare_image_inputs([PICTURE] * 2)
    assert image.shape == (2, 3, 16, 16) and image.min() >= 0
    with pytest.raises(ValueError, match="params lack controlnet"):
        pipeline(ids, image, params, jax.random.PRNGKey(5))
    params["controlnet"] = own
    theirs = pipeline.pipe(
        params, jax.random.PRNGKey(5), **TWO, image=[PICTURE] * 2, controlnet_conditioning_scale=0.7
    ).images

    def call(given, params, key, jit):
        return pipeline(*given, params, key, 3, controlnet_conditioning_scale=0.7, jit=jit).images

    close(pipeline, params, call, [ids, image], theirs)


def test_xl():
    import peers

    pipeline, params = flaxdiff.FlaxDiffusionPipeline.from_pretrained(peers.saved(peers.stable_diffusion_xl))
    assert type(pipeline) is flaxdiff.FlaxStableDiffusionXLPipeline
    ids, bad = pipeline.prepare_inputs(TWO["prompt"]), pipeline.prepare_inputs(["ugly", "bad"])
    assert ids.shape == (2, 2, 16)
    theirs = pipeline.pipe(params, jax.random.PRNGKey(5), **TWO).images

    def call(given, params, key, jit):
        return pipeline(*given, params, key, 3, jit=jit).images

    close(pipeline, params, call, [ids], theirs)
    avoided = pipeline.pipe(params, jax.random.PRNGKey(5), **TWO, negative_prompt=["ugly", "bad"]).images
    ours = pipeline(ids, params, jax.random.PRNGKey(5), 3, neg_prompt_ids=bad).images
    np.testing.assert_allclose(ours, avoided, atol=1e-5)
    assert np.abs(avoided - theirs).max() > 1e-3


def test_networks():
    """Against PyTorch's classes, whose arrays have the same axes."""
    import peers
    import torch

    rng, folder = np.random.default_rng(0), peers.saved(peers.stable_diffusion_1)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    peer = peers.stable_diffusion_1()
    x, t, text, picture = normal(2, 4, 8, 8), np.float32([3, 981]), normal(2, 5, 16), normal(2, 3, 16, 16)
    unet, params = flaxdiff.FlaxUNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    with torch.no_grad():
        theirs = peer.unet(*map(torch.tensor, (x, t, text))).sample
        there = peer.vae.encode(torch.tensor(picture)).latent_dist.mean
        decoded = peer.vae.decode(there).sample
    assert peers.relative(unet.apply({"params": params}, x, t, text).sample, theirs) < 1e-4
    assert unet.init_weights(jax.random.key(0)).keys() == params.keys()
    assert all(a.dtype == jnp.bfloat16 for a in unet.to_bf16(params).values())
    vae, params = flaxdiff.FlaxAutoencoderKL.from_pretrained(folder, subfolder="vae")
    run = lambda *args, **options: vae.apply({"params": params}, *args, **options)
    latent = run(picture, method=vae.encode).latent_dist.mean
    assert peers.relative(np.moveaxis(np.asarray(latent), -1, 1), there) < 1e-4
    for given in (latent, np.moveaxis(np.asarray(latent), -1, 1)):
        assert peers.relative(run(given, method=vae.decode).sample, decoded) < 1e-4
    assert peers.relative(run(picture).sample, decoded) < 1e-4
    net = flaxdiff.FlaxControlNetModel.from_config({"cross_attention_dim": 16, "block_out_channels": [32] * 4})
    out = jax.eval_shape(
        lambda p: net.apply({"params": p}, x, t, text, normal(2, 3, 64, 64)), flaxdiff.abstract(net.spec)
    )
    assert out.mid_block_res_sample.shape == (2, 1, 1, 32)
