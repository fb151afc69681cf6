"""Each task of each family against PyTorch's pipeline of the same name, with the same noise."""

import re

import diffusers
import jax
import numpy as np
import peers
import pytest
import safetensors.torch
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
)

import flaxdiff
from flaxdiff import images
from flaxdiff.pipelines.tasks import blank_inputs

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
KEY = jax.random.key(0)
PICTURE = rng.uniform(size=(1, 16, 16, 3)).astype(np.float32)
MASK = np.zeros((1, 16, 16, 1), np.float32)
MASK[:, 4:11, 3:14] = 1
pillow = lambda *shape: Image.fromarray(rng.integers(0, 255, shape, np.uint8))


def made(build, name, scheduler, **parts):
    """PyTorch's pipeline of that name with the components of another, and ours of what it saves."""

    def peer():
        components = build().components | parts
        cls = getattr(diffusers, name)
        accepted = {k: v for k, v in components.items() if k in cls.__init__.__code__.co_varnames}
        settings = {"requires_safety_checker": False} if "XL" not in name else {"add_watermarker": False}
        settings = {k: v for k, v in settings.items() if k in cls.__init__.__code__.co_varnames}
        pipe = cls(**accepted, **settings)
        peers.sure(pipe.vae)
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
    return peers.relative(run, pictures, of=type(pipe).__name__)


# --- inpainting ------------------------------------------------------------------------------------------------------


def other(build, part="unet", seed=5, **config):
    """A component of a pipeline with some settings changed, and other weights."""
    torch.manual_seed(seed)
    component = getattr(build(), part)
    plain = {k: v for k, v in component.config.items() if not k.startswith("_")}
    return type(component)(**{**plain, **config}).eval()


@pytest.mark.parametrize(
    ("name", "build", "channels", "scheduler"),
    [
        ("StableDiffusionInpaintPipeline", peers.stable_diffusion_1, 4, "PNDMScheduler"),
        slow("StableDiffusionInpaintPipeline", peers.stable_diffusion_1, 9, "DDIMScheduler"),
        ("StableDiffusionXLInpaintPipeline", peers.stable_diffusion_xl, 4, "EulerDiscreteScheduler"),
        slow("StableDiffusionXLInpaintPipeline", peers.stable_diffusion_xl, 9, "EulerDiscreteScheduler"),
    ],
)
def test_inpainting(name, build, channels, scheduler, monkeypatch):
    """Both kinds of network, in part and from noise alone."""
    pipe, params, peer = made(build, name, scheduler, unet=other(build, in_channels=channels))
    options = dict(prompt="cat", num_inference_steps=4, image=PICTURE, mask_image=MASK, guidance_scale=3.0)
    assert ("mask" in pipe.prepare_inputs(**options)) == (channels == 4)
    for strength in (0.6, 1.0):
        noise = normal(1, 8, 8, 4)
        assert compare(monkeypatch, pipe, params, peer, options | {"strength": strength}, noise) < 1e-3
    if name == "StableDiffusionInpaintPipeline":  # the part around the mask at full size, pasted back
        mask = Image.new("L", (30, 24))
        mask.paste(255, (10, 8, 16, 13))
        options |= dict(image=pillow(24, 30, 3), mask_image=images.blur(mask, 2), padding_mask_crop=2)
        options |= dict(output_type="pil", height=16, width=16)
        assert compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4)) <= 1 / 255
        assert pipe(params, KEY, **options).images[0].size == (30, 24)


def test_an_autoencoder_that_sees_the_mask(monkeypatch):
    """The decoder of AsymmetricAutoencoderKL is told of the picture around what is painted."""
    torch.manual_seed(0)
    halves = {f"{half}_block_out_channels": (16, 32) for half in ("down", "up")}
    types = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = diffusers.AsymmetricAutoencoderKL(**halves, **types, norm_num_groups=8, sample_size=16).eval()
    vae.register_to_config(block_out_channels=(16, 32))  # as published: the pipeline reads its factor there
    name = "StableDiffusionInpaintPipeline"
    pipe, params, peer = made(peers.stable_diffusion_1, name, "DDIMScheduler", vae=vae)
    options = dict(prompt="cat", num_inference_steps=2, image=PICTURE, mask_image=MASK, strength=0.6)
    options |= dict(height=16, width=16)
    assert compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4)) < 1e-3


@pytest.mark.slow
def test_an_ensemble_inpaints(monkeypatch):
    """The second half of the denoising goes on from latents that the first left as noisy as they were."""
    build, name = peers.stable_diffusion_xl, "StableDiffusionXLInpaintPipeline"
    pipe, params, peer = made(build, name, "EulerDiscreteScheduler", unet=other(build, in_channels=4))
    image = normal(1, 8, 8, 4)
    options = dict(prompt="cat", num_inference_steps=6, image=image, mask_image=MASK, denoising_start=0.5)
    assert (
        compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4), theirs=dict(height=16, width=16)) < 1e-3
    )


# --- other tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("StableDiffusionInstructPix2PixPipeline", peers.stable_diffusion_1),
        slow("StableDiffusionXLInstructPix2PixPipeline", peers.stable_diffusion_xl),
    ],
)
def test_edit(name, build, monkeypatch):
    pipe, params, peer = made(build, name, "EulerDiscreteScheduler", unet=other(build, in_channels=8))
    options = dict(prompt="cat", negative_prompt="dog", num_inference_steps=3, image=PICTURE)
    sizes = dict(height=16, width=16) if "XL" in name else {}
    for scale, image_scale in ((3.0, 1.2), (5.0, 2.0)):
        options |= dict(guidance_scale=scale, image_guidance_scale=image_scale)
        there = dict(image=torch.tensor(PICTURE).permute(0, 3, 1, 2), **sizes)
        assert compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4), theirs=there) < 1e-3


@pytest.mark.parametrize("name", ["LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"])
def test_latent_consistency(name, monkeypatch):
    build = peers.stable_diffusion_1
    pipe, params, peer = made(build, name, "LCMScheduler", unet=other(build, time_cond_proj_dim=10))
    options = dict(prompt="cat", num_inference_steps=1, guidance_scale=6.0, original_inference_steps=40)
    options |= dict(image=PICTURE, strength=0.5) if "Img2Img" in name else {}
    assert compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4)) < 1e-3
    inputs = pipe.prepare_inputs(**options | dict(num_inference_steps=3))
    there = dict(strength=0.5) if "Img2Img" in name else {}
    peer.scheduler.set_timesteps(3, original_inference_steps=40, **there)
    np.testing.assert_array_equal(inputs["plan"].timesteps[:3], peer.scheduler.timesteps)


@pytest.mark.slow
def test_upscale(monkeypatch, tmp_path):
    build = peers.stable_diffusion_2
    parts = dict(
        # as published, it attends to the text alone in all but one of the stages
        unet=other(build, in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False)),
        vae=other(build, "vae", scaling_factor=0.08333),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
    )
    pipe, params, peer = made(build, "StableDiffusionUpscalePipeline", "DDIMScheduler", **parts)
    options = dict(prompt="cat", num_inference_steps=3, image=PICTURE[:, :8, :8], noise_level=30, guidance_scale=3.0)
    key = jax.random.split(jax.random.fold_in(KEY, 0))[0]
    small = np.asarray(jax.random.normal(jax.random.fold_in(key, 3), (8, 8, 3)))[None]  # the noise that our key gives
    there = dict(image=torch.tensor(options["image"]).permute(0, 3, 1, 2))
    assert compare(monkeypatch, pipe, params, peer, options, [small, normal(1, 8, 8, 4)], theirs=there) < 1e-3
    flaxdiff.save(tmp_path / "saved", pipe, params)  # with its second scheduler
    again, _ = flaxdiff.load(tmp_path / "saved")
    assert again.low_res_scheduler == pipe.low_res_scheduler and again.scheduler == pipe.scheduler
    with pytest.raises(ValueError, match="noise_level=900 must lie between 0 and 350"):
        pipe.prepare_inputs(prompt="cat", image=PICTURE, noise_level=900)


CROWSON = dict(
    act_fn="gelu",
    attention_head_dim=16,
    block_out_channels=(32, 64, 64),
    down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    in_channels=8,
    out_channels=5,
    cross_attention_dim=16,
    conv_in_kernel=1,
    conv_out_kernel=1,
    norm_num_groups=None,
    resnet_time_scale_shift="scale_shift",
    time_cond_proj_dim=128 + 16,
    time_embedding_type="fourier",
    timestep_post_act="gelu",
    mid_block_type=None,
)


def test_latent_upscale(monkeypatch):
    """Pictures and latents; without guidance the prompt is empty."""
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(**CROWSON).eval()
    name = "StableDiffusionLatentUpscalePipeline"
    pipe, params, peer = made(peers.stable_diffusion_1, name, "EulerDiscreteScheduler", unet=net)
    peer.scheduler.register_to_config(prediction_type="sample")
    pipe = pipe.replace(scheduler=flaxdiff.EulerDiscreteScheduler.from_config(pipe.scheduler, prediction_type="sample"))
    options = dict(prompt="cat", negative_prompt="dog", num_inference_steps=3, guidance_scale=3.0)
    noise = normal(1, 16, 16, 4)
    assert compare(monkeypatch, pipe, params, peer, options | dict(image=normal(1, 8, 8, 4)), noise) < 1e-3
    there = dict(image=torch.tensor(PICTURE).permute(0, 3, 1, 2))
    options |= dict(image=PICTURE, guidance_scale=0.0)
    assert compare(monkeypatch, pipe, params, peer, options, noise, theirs=there) < 1e-3
    with pytest.raises(ValueError, match="12 x 32 pixels does not divide.*whose sides are multiples of 4"):
        pipe.prepare_inputs(prompt="cat", image=normal(1, 3, 8, 4))
    with pytest.raises(ValueError, match="prompt_embeds and pooled_prompt_embeds go together"):
        pipe.prepare_inputs(image=PICTURE, prompt_embeds=normal(1, 5, 16))


ESTIMATOR = peers.lively(
    DPTForDepthEstimation(
        DPTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8] * 4,
            fusion_hidden_size=8,
        )
    )
)


@pytest.mark.slow
def test_depth_to_image(monkeypatch, tmp_path):
    build, depth = peers.stable_diffusion_2, normal(1, 11, 13)
    parts = dict(
        unet=other(build, in_channels=5),
        depth_estimator=ESTIMATOR,
        feature_extractor=DPTImageProcessor(size={"height": 32, "width": 32}),
    )
    pipe, params, peer = made(build, "StableDiffusionDepth2ImgPipeline", "DDIMScheduler", **parts)
    options = dict(prompt="cat", num_inference_steps=4, image=PICTURE, strength=0.6, depth_map=depth)
    there = dict(depth_map=torch.tensor(depth), image=torch.tensor(PICTURE).permute(0, 3, 1, 2))
    assert compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4), theirs=there) < 1e-3
    options |= dict(depth_map=None, image=pillow(16, 16, 3))  # as the checkpoint's own model sees it
    assert compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4)) < 1e-3
    flaxdiff.save(tmp_path / "saved", pipe, params)
    assert dict(flaxdiff.load(tmp_path / "saved")[0].specs)["depth_estimator"] == pipe.depth_estimator
    alone = pipe.replace(specs=tuple(part for part in pipe.specs if part[0] != "depth_estimator"))
    with pytest.raises(ValueError, match="give depth_map="):
        alone.prepare_inputs(**options)


def vision(layers):
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )


EXTRACTOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def test_image_variation(monkeypatch):
    build = peers.stable_diffusion_1
    torch.manual_seed(0)
    encoder = CLIPVisionModelWithProjection(vision(2)).eval()
    parts = dict(image_encoder=encoder, feature_extractor=EXTRACTOR, safety_checker=None)
    pipe, params, peer = made(build, "StableDiffusionImageVariationPipeline", "DDIMScheduler", **parts)
    options = dict(image=pillow(50, 40, 3), num_inference_steps=3)
    assert compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4)) < 1e-3
    with pytest.raises(ValueError, match="starts from a picture"):
        pipe.prepare_inputs()


def example_encoder():
    torch.manual_seed(0)
    return peers.lively(PaintByExampleImageEncoder(vision(9)))  # of which two blocks follow


def test_paint_by_example(monkeypatch, tmp_path):
    build, name = peers.stable_diffusion_1, "PaintByExamplePipeline"
    parts = dict(image_encoder=example_encoder(), feature_extractor=EXTRACTOR, safety_checker=None)
    pipe, params, peer = made(build, name, "DDIMScheduler", **parts, unet=other(build, in_channels=9))
    mask = Image.fromarray(np.uint8(255 * MASK[0, ..., 0]))
    options = dict(image=pillow(16, 16, 3), mask_image=mask, example_image=pillow(50, 40, 3), num_inference_steps=3)
    for scale in (5.0, 1.0):
        options["guidance_scale"] = scale
        assert compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4)) < 1e-3
    flaxdiff.save(tmp_path / "saved", pipe, params)
    tensors = safetensors.torch.load_file(tmp_path / "saved" / "image_encoder" / "model.safetensors")
    there = peer.image_encoder.state_dict()  # no index leads PyTorch to this class, but it has these names
    assert set(tensors) == set(there) and all(torch.equal(there[k], v) for k, v in tensors.items())
    assert flaxdiff.load(tmp_path / "saved")[0].image_encoder == pipe.image_encoder
    blank = blank_inputs(pipe, batch=2)
    assert blank["image_pixels"].shape == (2, 32, 32, 3) and blank["behind"].shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="paints what another picture shows; give example_image="):
        pipe.prepare_inputs(image=PICTURE, mask_image=MASK)
    with pytest.raises(ValueError, match=r"give both image= and mask_image= \(mask_image is missing\)"):
        pipe.prepare_inputs(image=PICTURE, example_image=PICTURE)
    with pytest.raises(ValueError, match="height=15, width=16.*positive multiples of 2"):
        pipe.prepare_inputs(image=PICTURE[:, 1:], mask_image=MASK, example_image=PICTURE)
    with pytest.raises(ValueError, match="5 beside it, but it takes 8"):
        pipe.replace(unet=flaxdiff.load()[0].unet).prepare_inputs(image=PICTURE, mask_image=MASK, example_image=PICTURE)


def test_paint_by_example_encoder(tmp_path):
    """As PyTorch's writes it today, and under the names of the published files."""
    peer, pixels = example_encoder(), normal(2, 32, 32, 3)
    peer.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs, nothing = peer(peers.nchw(pixels), return_uncond_vector=True)
    for old in (False, True):
        if old:
            tensors = {re.sub(r"^model\.", "model.vision_model.", k): v for k, v in peer.state_dict().items()}
            tensors["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
            safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        spec, params = flaxdiff.PaintByExampleImageEncoder.from_pretrained(tmp_path)
        ours = flaxdiff.apply(spec, params, pixels)
        assert peers.relative(ours, theirs, of="PaintByExampleImageEncoder") < 1e-5
        np.testing.assert_array_equal(flaxdiff.apply(spec, params, method="nothing"), nothing.detach())


@pytest.mark.parametrize("channels", [4, 6])
def test_ldm3d(channels):
    build, name = peers.stable_diffusion_1, "StableDiffusionLDM3DPipeline"
    vae = peers.vae(in_channels=channels, out_channels=channels)
    parts = dict(vae=vae, image_encoder=None, safety_checker=None, feature_extractor=None)
    pipe, params, peer = made(build, name, "DDIMScheduler", **parts)
    noise, options = normal(2, 8, 8, 4), dict(prompt=["cat", "red"], num_inference_steps=2, guidance_scale=3.0)
    run = lambda kind: pipe(params, KEY, **options, latents=noise, output_type=kind)
    with torch.no_grad():
        theirs = peer(**options, latents=peers.nchw(noise), output_type="np")
    ours, pillows = run("np"), run("pil")
    assert peers.relative(ours.rgb, theirs.rgb, of=name) < 1e-3
    sixteen = np.stack([np.asarray(image) for image in pillows.depth])[..., None]
    assert sixteen.dtype == np.uint16 and pillows.rgb[1].size == pillows.depth[1].size == (16, 16)
    assert ours.nsfw_content_detected is None and np.abs(ours.depth - sixteen / 65535).max() < 1e-4
    if channels == 4:  # PyTorch's makes no pictures of them with today's Pillow
        assert peers.relative(ours.depth, theirs.depth, of=name) < 1e-3
        np.testing.assert_array_equal(sixteen, np.uint16(ours.depth * 65535))
    else:  # where PyTorch's adds bytes of 8 bits it overflows: what they stand for
        decoded = pipe.program.decode(params, run("latent").images)
        high, low = np.moveaxis(np.round(255 * np.asarray(decoded)[..., 4:]), -1, 0)
        np.testing.assert_array_equal(sixteen[..., 0], 256 * high + low)
    with pytest.raises(ValueError, match="decodes 3 channels; a picture with its depth has 4 or 6"):
        pipe.replace(vae=flaxdiff.load()[0].vae).prepare_inputs(prompt="cat")


# --- what holds of all -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji():
    return flaxdiff.load()


def test_nothing_recompiles(emoji):
    """Picture, mask, strength and what guides are values."""

    pipe, params = emoji
    pipe = flaxdiff.AutoPipelineForInpainting.from_pipe(pipe).replace(progress=False)
    black, white = np.zeros((16, 16, 3)), np.ones((16, 16, 3))
    size, sizes = dict(height=16, width=16, num_inference_steps=2, output_type="np"), []
    runs = [
        dict(image=black, mask_image=MASK[0]),
        dict(image=white, mask_image=1 - MASK[0], strength=0.5),
        dict(image=black, mask_image=Image.new("L", (16, 16)), guidance_scale=2.0),
    ]
    pictures = []
    for run in runs:
        pictures.append(pipe(params, KEY, prompt="red apple", **run, **size).images)
        sizes.append(peers.programs())
    assert sizes[0] == sizes[1] == sizes[2]
    assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(pictures, pictures[1:]))


def test_each_picture_has_its_mask_and_prompt(emoji):
    pipe, _ = emoji
    pipe = flaxdiff.StableDiffusionInpaintPipeline.from_pipe(pipe)
    inputs = pipe.prepare_inputs(prompt="x", image=np.zeros((64, 64, 3)), mask_image=np.eye(64), num_inference_steps=2)
    assert inputs["mask"].shape == (1, 16, 16, 1) and inputs["image"].min() == inputs["image"].max() == -1
    small = pipe.prepare_inputs(
        prompt=["x", "y"], image=np.zeros((2, 16, 16, 3)), mask_image=np.ones((16, 16)), num_images_per_prompt=2
    )
    assert small["image"].shape == (4, 64, 64, 3) and small["mask"].shape == (4, 16, 16, 1)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        ("Inpaint", dict(image=PICTURE), r"give both image= and mask_image= \(mask_image is missing\)"),
        ("Inpaint", dict(mask_image=MASK), r"\(image is missing\)"),
        ("Inpaint", dict(image=PICTURE, mask_image=PICTURE), r"Expected masks \[B, H, W, 1\]"),
        ("Inpaint", dict(image=PICTURE, mask_image=MASK, strength=0), "strength=0 must lie in"),
        ("Inpaint", dict(image=PICTURE, mask_image=MASK, padding_mask_crop=2), "one Pillow picture"),
        (
            "Inpaint",
            dict(image=Image.new("RGB", (9, 9)), mask_image=Image.new("L", (8, 9)), padding_mask_crop=2),
            "mask of the picture's size",
        ),
        (
            "Inpaint",
            dict(image=Image.new("RGB", (9, 9)), mask_image=Image.new("L", (9, 9)), padding_mask_crop=2),
            "black all over",
        ),
        ("InstructPix2Pix", dict(image=PICTURE), "8 channels of the sample and 8 beside it, but it takes 8"),
        ("InstructPix2Pix", dict(), "starts from a picture"),
        ("Depth2Img", dict(image=PICTURE), "it takes 8"),
        ("Upscale", dict(), "starts from a picture"),
    ],
)
def test_bad_input(emoji, cls, options, message):
    pipe, _ = emoji
    pipe = getattr(flaxdiff, f"StableDiffusion{cls}Pipeline").from_pipe(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.prepare_inputs(prompt="x", **options)


@pytest.mark.parametrize("cls", ["Inpaint", "Img2Img"])
def test_blank_inputs_have_the_shapes_of_a_call(emoji, cls):
    """What is compiled ahead of a call serves it."""
    pipe = getattr(flaxdiff, f"StableDiffusion{cls}Pipeline").from_pipe(emoji[0])
    mask = dict(mask_image=MASK[0], height=16, width=16) if cls == "Inpaint" else {}
    there = blank_inputs(pipe, height=16, width=16)
    here = pipe.prepare_inputs(prompt="x", image=PICTURE, **mask)
    shapes = lambda inputs: jax.tree.map(lambda a: (np.shape(a), np.asarray(a).dtype), inputs)
    assert shapes(there) == shapes(here)


def test_no_counterpart(emoji):
    pipe, _ = emoji
    upscaler = flaxdiff.StableDiffusionUpscalePipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="no pipeline for inpainting beside StableDiffusionUpscalePipeline"):
        flaxdiff.AutoPipelineForInpainting.from_pipe(upscaler)
    with pytest.raises(ValueError, match="'sample_foo' is no sampler of k-diffusion"):
        flaxdiff.StableDiffusionKDiffusionPipeline.from_pipe(pipe).set_scheduler("sample_foo")


def test_k_diffusion_names_schedulers(emoji):
    from flaxdiff.schedulers.names import K_SAMPLERS

    pipe, _ = emoji
    pipe = flaxdiff.StableDiffusionKDiffusionPipeline.from_pipe(pipe)
    for name in K_SAMPLERS:
        swapped = pipe.set_scheduler(name)
        assert swapped.scheduler.beta_end == pipe.scheduler.beta_end and swapped.program is pipe.program
    assert pipe.set_scheduler("sample_dpmpp_2m", use_karras_sigmas=True).scheduler.use_karras_sigmas


# --- pictures on the host --------------------------------------------------------------------------------------------


def test_masks_are_processed_as_theirs():
    """Boxes, sizes, thresholds and overlays of random pictures, pixel for pixel."""
    plain = VaeImageProcessor(vae_scale_factor=2)
    masks = VaeImageProcessor(vae_scale_factor=2, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    for _ in range(40):
        (w, h), (width, height), pad = (
            rng.integers(6, 60, 2),
            map(int, rng.integers(3, 24, 2) * 2),
            int(rng.integers(9)),
        )
        x, y = rng.integers(0, w - 1), rng.integers(0, h - 1)
        marked = np.zeros((h, w), np.uint8)
        marked[y : y + rng.integers(1, h), x : x + rng.integers(1, w)] = rng.integers(1, 255)
        picture, mask = pillow(h, w, 3), Image.fromarray(marked)
        box = images.crop_region(mask, width, height, pad)
        assert box == tuple(map(int, plain.get_crop_region(mask, width, height, pad)))
        for part, mode in ((None, "default"), (box, "fill")):
            theirs = peers.nhwc(plain.preprocess(picture, height, width, mode, part))
            np.testing.assert_allclose(images.to_array(picture, height, width, part), theirs, atol=1e-6)
            theirs = peers.nhwc(masks.preprocess(mask, height, width, mode, part))
            np.testing.assert_array_equal(images.to_mask(mask, height, width, part), theirs)
        array = np.float32(rng.uniform(size=(2, h, w, 3)))
        theirs = peers.nhwc(plain.preprocess(array, height, width))
        np.testing.assert_allclose(images.to_array(array, height, width), theirs, atol=1e-6)
        painted = pillow(height, width, 3)
        theirs = plain.apply_overlay(mask, picture, painted, box)
        np.testing.assert_array_equal(np.asarray(images.apply_overlay(mask, picture, painted, box)), np.asarray(theirs))
        np.testing.assert_array_equal(np.asarray(images.blur(mask, 3)), np.asarray(plain.blur(mask, 3)))
        signed = 2 * array - 1.2
        theirs = plain.postprocess(peers.nchw(signed), "np")
        np.testing.assert_allclose(flaxdiff.VaeImageProcessor.postprocess(signed, "np"), theirs, atol=1e-6)
        theirs = plain.postprocess(peers.nchw(signed))
        for ours, its in zip(flaxdiff.VaeImageProcessor.postprocess(signed), theirs, strict=True):
            assert np.abs(np.int32(ours) - np.int32(its)).max() <= 1
        theirs = torch.nn.functional.interpolate(peers.nchw(array), (height, width), mode="bicubic")
        np.testing.assert_allclose(images.bicubic(array, height, width), peers.nhwc(theirs), atol=1e-5)


def test_load_image(tmp_path):
    """Upright and in RGB, as diffusers reads it; what is no picture is named."""
    picture, exif = pillow(8, 6, 3), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "it.png", exif=exif)
    theirs = diffusers.utils.load_image(str(tmp_path / "it.png"))
    ours = flaxdiff.load_image(tmp_path / "it.png")
    assert ours.size == (8, 6) and np.array_equal(np.asarray(ours), np.asarray(theirs))
    (tmp_path / "no.png").write_bytes(b"no picture")
    for source in (tmp_path / "no.png", tmp_path / "absent.png", "http://127.0.0.1:9/it.png"):
        with pytest.raises(ValueError, match="is no picture that can be read"):
            flaxdiff.load_image(source)
