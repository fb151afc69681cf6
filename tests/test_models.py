"""Every model against PyTorch's class at a tiny configuration, and at full size by shapes alone."""

import functools
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
import transformers
from diffusers.pipelines.deprecated import unidiffuser as unidiffuser_models
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

import flaxdiff
from flaxdiff.published import COMPONENTS

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)


def load(build, component, **options):
    """A component of a saved PyTorch pipeline, here and there."""
    pipe = build()
    name = type(getattr(pipe, component)).__name__
    spec, params = getattr(flaxdiff, name).from_pretrained(peers.saved(build), subfolder=component, **options)
    return spec, params, getattr(pipe, component)


UNETS = [
    peers.stable_diffusion_1,
    peers.stable_diffusion_2,
    peers.stable_diffusion_xl,
    peers.stable_diffusion_xl_refiner,
]


def agree(peer, ours, theirs):
    """What our model computes is what PyTorch's `peer` does."""
    assert peers.relative(ours, theirs, of=type(peer).__name__) < 1e-4


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("build", UNETS)
def test_unet_2d_condition(build, scan):
    """Odd sizes too: the up stages must find the size of the skips."""
    spec, params, peer = load(build, "unet", scan_layers=scan)
    height, width = (10, 13) if scan else (8, 8)
    x, t = normal(2, height, width, 4), np.float32([3, 981])
    text = normal(2, 5, spec.config.cross_attention_dim)
    added = None
    if spec.config.addition_embed_type:
        sizes = (spec.config.projection_class_embeddings_input_dim - 24) // 8
        added = {"text_embeds": normal(2, 24), "time_ids": np.float32(rng.integers(0, 999, (2, sizes)))}
    with torch.no_grad():
        there = added and {k: torch.tensor(v) for k, v in added.items()}
        theirs = peer(peers.nchw(x), torch.tensor(t), torch.tensor(text), added_cond_kwargs=there).sample
    ours = jax.jit(lambda params: flaxdiff.apply(spec, params, x, t, text, added_cond_kwargs=added))(params)
    agree(peer, ours, peers.nhwc(theirs))


CROWSON = dict(
    act_fn="gelu",
    attention_head_dim=64,
    block_out_channels=(384, 384, 768, 768),
    down_block_types=("KDownBlock2D",) + ("KCrossAttnDownBlock2D",) * 3,
    up_block_types=("KCrossAttnUpBlock2D",) * 3 + ("KUpBlock2D",),
    in_channels=8,
    out_channels=5,
    layers_per_block=4,
    cross_attention_dim=768,
    conv_in_kernel=1,
    conv_out_kernel=1,
    norm_num_groups=None,
    resnet_time_scale_shift="scale_shift",
    time_cond_proj_dim=896,
    time_embedding_type="fourier",
    timestep_post_act="gelu",
    mid_block_type=None,
)
SMALL = dict(attention_head_dim=16, cross_attention_dim=16, time_cond_proj_dim=20, norm_num_groups=32)


@pytest.mark.parametrize(("widths", "layers"), [((32, 64, 64), 2), ((32, 32, 64, 64), 3)])
def test_unet_of_the_latent_upscaler(widths, layers, tmp_path):
    """Katherine Crowson's stages, with a normalisation at the end and without."""
    torch.manual_seed(0)
    kinds = {f"{way}_block_types": (CROWSON[f"{way}_block_types"]) for way in ("down", "up")}
    kinds = {"down_block_types": kinds["down_block_types"][: len(widths)]} | {
        "up_block_types": kinds["up_block_types"][-len(widths) :]
    }
    config = CROWSON | SMALL | kinds | dict(block_out_channels=widths, layers_per_block=layers)
    config |= dict(norm_num_groups=None) if layers == 2 else {}
    peer = diffusers.UNet2DConditionModel(**config).eval()
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.UNet2DConditionModel.from_pretrained(tmp_path)
    x, t, text, told = normal(2, 16, 24, 8), np.float32([0.3, -1]), normal(2, 5, 16), normal(2, 20)
    with torch.no_grad():
        args = torch.tensor(t), torch.tensor(text)
        theirs = peer(peers.nchw(x), *args, timestep_cond=torch.tensor(told)).sample
    run = jax.jit(lambda params: flaxdiff.apply(spec, params, x, t, text, timestep_cond=told))
    agree(peer, run(params), peers.nhwc(theirs))


def test_unet_2d():
    spec, params, peer = load(peers.ddpm, "unet")
    x, t = normal(2, 8, 8, 3), np.float32([3, 981])
    with torch.no_grad():
        theirs = peer(peers.nchw(x), torch.tensor(t)).sample
    agree(peer, flaxdiff.apply(spec, params, x, t), peers.nhwc(theirs))


def test_autoencoder_kl():
    spec, params, peer = load(peers.stable_diffusion_1, "vae")
    image, latent = normal(2, 12, 16, 3), normal(2, 6, 8, 4)
    with torch.no_grad():
        posterior, decoded = peer.encode(peers.nchw(image)).latent_dist, peer.decode(peers.nchw(latent)).sample
    ours = flaxdiff.apply(spec, params, image, method="encode")
    agree(peer, ours.mean, peers.nhwc(posterior.mean))
    agree(peer, ours.logvar, peers.nhwc(posterior.logvar))
    agree(peer, ours.kl(), posterior.kl().numpy())
    agree(peer, flaxdiff.apply(spec, params, latent, method="decode"), peers.nhwc(decoded))


FOUR = dict(norm_num_groups=8, latent_channels=4)
AUTOENCODERS = {
    "AutoencoderTiny": dict(
        encoder_block_out_channels=(16,) * 4,
        decoder_block_out_channels=(16,) * 4,
        num_encoder_blocks=(1, 2, 1, 1),
        num_decoder_blocks=(2, 1, 1, 1),
    ),
    "VQModel": dict(
        **FOUR,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        vq_embed_dim=6,
        num_vq_embeddings=20,
    ),
    "AsymmetricAutoencoderKL": dict(
        **FOUR,
        down_block_types=("DownEncoderBlock2D",) * 4,
        down_block_out_channels=(8, 8, 16, 16),
        up_block_types=("UpDecoderBlock2D",) * 4,
        up_block_out_channels=(8, 16, 32, 32),
        layers_per_up_block=2,
    ),
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders(name, tmp_path):
    torch.manual_seed(0)
    peer = getattr(diffusers, name)(**AUTOENCODERS[name]).eval()
    peer.save_pretrained(tmp_path)
    spec, params = getattr(flaxdiff, name).from_pretrained(tmp_path)
    run = lambda *args, **kwargs: flaxdiff.apply(spec, params, *args, **kwargs)
    image = np.clip(normal(2, 24, 16, 3), -1, 1)
    with torch.no_grad():
        theirs = peer.encode(peers.nchw(image))
        latent = theirs.latent_dist.mean if "latent_dist" in theirs else theirs.latents
        decoded, whole = peer.decode(latent).sample, peer(peers.nchw(image)).sample
    agree(peer, run(image, method="encode").mean, peers.nhwc(latent))
    agree(peer, run(peers.nhwc(latent), method="decode"), peers.nhwc(decoded))
    agree(peer, run(image), peers.nhwc(whole))
    sliced = spec.replace(slicing=True)
    agree(peer, flaxdiff.apply(sliced, params, image), peers.nhwc(whole))
    if name == "AutoencoderTiny":  # tiles of its own kind
        peer.enable_tiling()
        peer.tile_sample_min_size, peer.tile_latent_min_size = 128, 16
        large, latent = normal(1, 200, 136, 3), normal(1, 25, 17, 4)
        with torch.no_grad():
            encoded, decoded = peer.encode(peers.nchw(large)).latents, peer.decode(peers.nchw(latent)).sample
        tiled = functools.partial(flaxdiff.apply, spec.replace(tiling=128), params)
        agree(peer, tiled(large, method="encode").mean, peers.nhwc(encoded))
        agree(peer, tiled(latent, method="decode"), peers.nhwc(decoded))
    if name == "VQModel":
        with torch.no_grad():
            codes = peer.quantize(latent)[2][2].reshape(2, *latent.shape[2:])
        ours = run(image, method="codes")
        np.testing.assert_array_equal(ours, codes)
        agree(peer, run(ours, method="decode"), peers.nhwc(decoded))
    if name == "AsymmetricAutoencoderKL":
        mask = np.float32(rng.random((2, 24, 16, 1)) > 0.5)
        with torch.no_grad():
            decoded = peer.decode(latent, image=peers.nchw(image), mask=peers.nchw(mask)).sample
        agree(peer, run(peers.nhwc(latent), image, mask, method="decode"), peers.nhwc(decoded))


def test_consistency_decoder_vae(tmp_path, monkeypatch):
    torch.manual_seed(0)
    widths = dict(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32, 32, 32, 64))
    peer = diffusers.ConsistencyDecoderVAE(**widths, encoder_layers_per_block=1, decoder_layers_per_block=1).eval()
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.ConsistencyDecoderVAE.from_pretrained(tmp_path)
    latent, key = normal(2, 2, 3, 4), jax.random.key(3)
    ours = flaxdiff.apply(spec, params, latent, key, method="decode")
    # the noise that our keys draw, handed to PyTorch
    first, rest = jax.random.split(key)
    state = flaxdiff.ConsistencyDecoderScheduler().init(flaxdiff.ConsistencyDecoderScheduler().plan(2), ours, rest)
    draws = [jax.random.normal(first, ours.shape)]
    draws += [
        jax.vmap(lambda k, i=i: jax.random.normal(jax.random.fold_in(k, i), ours.shape[1:]))(state.key) for i in (0, 1)
    ]
    noise = iter([peers.nchw(np.asarray(draw)) for draw in draws])
    for module in (
        diffusers.models.autoencoders.consistency_decoder_vae,
        diffusers.schedulers.scheduling_consistency_decoder,
    ):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noise))
    with torch.no_grad():
        theirs = peer.decode(peers.nchw(latent)).sample
    agree(peer, ours, peers.nhwc(theirs))
    image = normal(1, 16, 16, 3)
    with torch.no_grad():
        posterior = peer.encode(peers.nchw(image)).latent_dist
    agree(peer, flaxdiff.apply(spec, params, image, method="encode").mean, peers.nhwc(posterior.mean))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_clip(component, scan):
    spec, params, peer = load(peers.stable_diffusion_xl, component, scan_layers=scan)
    ids = peers.tokenizer()(["a red dog", "cat"], padding="max_length", return_tensors="np")["input_ids"]
    with torch.no_grad():
        theirs = peer(torch.tensor(ids), output_hidden_states=True)
    ours = flaxdiff.apply(spec, params, jnp.asarray(ids, jnp.int32))
    agree(peer, ours.last_hidden_state, theirs.last_hidden_state)
    agree(peer, ours.hidden_states, torch.stack(theirs.hidden_states))
    key = "text_embeds" if component == "text_encoder_2" else "pooler_output"
    agree(peer, getattr(ours, key), getattr(theirs, key))


@pytest.mark.parametrize("scan", [True, False])
def test_clip_vision(scan, tmp_path):
    peer = peers.image_encoder()
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.CLIPVisionModelWithProjection.from_pretrained(tmp_path, scan_layers=scan)
    pixels = normal(2, 32, 32, 3)
    with torch.no_grad():
        theirs = peer(peers.nchw(pixels), output_hidden_states=True)
    ours = flaxdiff.apply(spec, params, pixels)
    for key in ("image_embeds", "last_hidden_state"):
        agree(peer, getattr(ours, key), getattr(theirs, key))
    agree(peer, ours.hidden_states, torch.stack(theirs.hidden_states))
    with pytest.raises(ValueError, match="reads pictures of 32 x 32 pixels, and was given 16 x 32"):
        flaxdiff.apply(spec, params, pixels[:, :16])


BIT = dict(depths=[1, 2, 1], hidden_sizes=[16, 32, 40], embedding_size=8, num_groups=4)
BIT |= dict(model_type="bit", global_padding="same", layer_type="bottleneck", embedding_dynamic_padding=True)
BIT |= dict(out_features=["stage1", "stage2", "stage3"])


@pytest.mark.parametrize("hybrid", [False, True])
def test_dpt(hybrid, tmp_path):
    shared = dict(hidden_size=16, num_hidden_layers=5, num_attention_heads=2, intermediate_size=24, image_size=48)
    shared |= dict(patch_size=16, backbone_out_indices=[0, 1, 2, 4], fusion_hidden_size=8)
    plain = dict(neck_hidden_sizes=[8, 12, 16, 24])
    mixed = dict(neck_hidden_sizes=[16, 32, 16, 24], reassemble_factors=[1, 1, 1, 0.5], is_hybrid=True)
    mixed |= dict(backbone_featmap_shape=[1, 40, 3, 3], backbone_config=BIT)
    config = transformers.DPTConfig(**shared, **(mixed if hybrid else plain))
    peer = peers.lively(transformers.DPTForDepthEstimation(config))
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.DPTForDepthEstimation.from_pretrained(tmp_path)
    pixels = normal(2, 48, 48, 3)
    with torch.no_grad():
        theirs = peer(peers.nchw(pixels)).predicted_depth
    assert theirs.std() > 0.1
    agree(peer, flaxdiff.apply(spec, params, pixels), theirs)
    with pytest.raises(ValueError, match="reads pictures of 48 x 48 pixels, and was given 16 x 48"):
        flaxdiff.apply(spec, params, pixels[:, :16])


@pytest.mark.parametrize("size", [(50, 40), (31, 77), (32, 32)])
def test_clip_pixels(size):
    from PIL import Image

    picture = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
    processor = transformers.CLIPImageProcessorPil(size=32, crop_size=32)
    theirs = np.asarray(processor(picture, return_tensors="np").pixel_values)[0].transpose(1, 2, 0)
    np.testing.assert_allclose(flaxdiff.images.clip_pixels(picture, 32)[0], theirs, atol=1e-5)
    processor = transformers.DPTImageProcessor(size={"height": 32, "width": 32})
    theirs = np.asarray(processor(picture, return_tensors="np").pixel_values)[0].transpose(1, 2, 0)
    np.testing.assert_allclose(flaxdiff.images.square_pixels(picture, 32)[0], theirs, atol=1e-5)


def test_clip_of_the_first_configurations():
    """eos_token_id 2 was a mistake: the end of the text is the largest id."""
    torch.manual_seed(0)
    options = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    peer = transformers.CLIPTextModel(transformers.CLIPTextConfig(**options, eos_token_id=2)).eval()
    spec = flaxdiff.CLIPTextModel.from_config(peer.config.to_dict())
    params = flaxdiff.init(spec, jax.random.key(0))
    ids = jnp.array([[5, 98, 7, 7], [5, 6, 7, 98]])
    out = flaxdiff.apply(spec, params, ids)
    assert (out.pooler_output == out.last_hidden_state[jnp.arange(2), jnp.array([1, 3])]).all()


# --- full size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", COMPONENTS)
def test_full_size(name, scan):
    """Names and shapes are those of PyTorch's class, and one call computes, all without memory."""
    from flaxdiff.checkpoint import convert

    class_name, config = COMPONENTS[name]
    spec = getattr(flaxdiff, class_name).from_config({**config, "scan_layers": scan})
    with torch.device("meta"):
        if hasattr(diffusers, class_name):
            peer = getattr(diffusers, class_name)(**config)
        elif class_name == "LDMBertModel":
            peer = LDMBertModel(LDMBertConfig(**config))
        else:
            peer = getattr(transformers, class_name)
            peer = peer(peer.config_class(**config))
    state = peer.state_dict().items()
    theirs = {name: tuple(value.shape) for name, value in state if not re.fullmatch(spec.module.ignored, name)}
    flat = {"CLIPTextModel": "text_model.", "SiglipVisionModel": "vision_model."}  # what the class leaves out, and
    theirs = {f"{flat.get(class_name, '')}{name}": shape for name, shape in theirs.items()}  # published files do not
    leaves = flaxdiff.layout(spec).items()
    ours = {n: convert.shape_in_file(leaf) for own, leaf in leaves for n in convert.names_in_file(own, leaf)}
    assert ours == theirs


def hybrid():
    """The depth model of Stable Diffusion 2's depth-to-image, whose residual network has transformers' defaults."""
    config = dict(is_hybrid=True, neck_hidden_sizes=[256, 512, 768, 768], reassemble_factors=[1, 1, 1, 0.5])
    return transformers.DPTForDepthEstimation(transformers.DPTConfig(**config)), config


def karlo():
    """What joins CLIP's embeddings in Karlo."""
    config = dict(time_embed_dim=1280, cross_attention_dim=1536)
    return UnCLIPTextProjModel(**config), config


def unidiffuser():
    """thu-ml/unidiffuser-v1's denoiser."""
    config = dict(text_dim=64, clip_img_dim=512, num_attention_heads=24, attention_head_dim=64, num_layers=30)
    config |= dict(
        in_channels=4,
        out_channels=4,
        sample_size=64,
        patch_size=2,
        activation_fn="gelu",
        num_embeds_ada_norm=1000,
        use_data_type_embedding=True,
    )
    return unidiffuser_models.UniDiffuserModel(**config), config


def unidiffuser_text_decoder():
    """Its text decoder; the file has the table of tokens once more, as what tells the next one."""
    config = dict(prefix_length=77, prefix_inner_dim=768, prefix_hidden_dim=64)
    peer = unidiffuser_models.UniDiffuserTextDecoder(**config)
    peer.transformer.lm_head = None
    return peer, config


@pytest.mark.parametrize("build", [hybrid, karlo, unidiffuser, unidiffuser_text_decoder])
def test_full_size_beside_the_denoiser(build):
    from flaxdiff.checkpoint import convert

    with torch.device("meta"):
        peer, config = build()
    leaves = flaxdiff.layout(getattr(flaxdiff, type(peer).__name__).from_config(config)).items()
    ours = {n: convert.shape_in_file(leaf) for own, leaf in leaves for n in convert.names_in_file(own, leaf)}
    assert ours == {name: tuple(value.shape) for name, value in peer.state_dict().items()}


def call(spec):
    """A call of a model at its own size, as abstract arrays."""
    f32, c = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32), spec.config
    match spec.module.__name__:
        case "UNet2DConditionModel":
            added = None
            if c.addition_embed_type:
                sizes = 6 if c.cross_attention_dim == 2048 else 5
                added = {"text_embeds": f32(2, 1280), "time_ids": f32(2, sizes)}
            n = c.sample_size or 64
            told = {"identity": 4 * c.block_out_channels[0], "projection": c.projection_class_embeddings_input_dim}
            labels = f32(2, told[c.class_embed_type]) if c.class_embed_type else None
            args = f32(2, n, n, c.in_channels), f32(), f32(2, 77, c.cross_attention_dim), added, None, None, (), labels
            return args, (2, n, n, c.out_channels)
        case "UNet2DModel":
            labels = () if c.num_class_embeds is None else (jax.ShapeDtypeStruct((2,), jnp.int32),)
            n = c.sample_size
            return (f32(2, n, n, c.in_channels), f32(), *labels), (2, n, n, c.out_channels)
        case "DiTTransformer2DModel":
            n, labels = c.sample_size, jax.ShapeDtypeStruct((2,), jnp.int32)
            return (f32(2, n, n, 4), f32(), labels), (2, n, n, 8)
        case "FluxControlNetModel":
            seen = f32(2, 4096, 64) if c.num_mode else f32(2, 1024, 1024, 3)
            x, text, mode = f32(2, 4096, 64), f32(2, 512, 4096), jax.ShapeDtypeStruct((2,), jnp.int32)
            args = x, seen, text, f32(2, 768), f32(2), f32(4096, 3), None, f32(2), mode
            return args, (c.num_layers, 2, 4096, c.width)
        case "FluxTransformer2DModel":
            x, text, ids = f32(2, 4096, c.in_channels), f32(2, 512, c.joint_attention_dim), f32(4096, 3)
            args = x, text, f32(2, c.pooled_projection_dim), f32(), ids, None
            return (*args, f32(2)) if c.guidance_embeds else args, (2, 4096, 64)
        case "SD3Transformer2DModel":
            n, text = c.sample_size, f32(2, 333, 4096)
            return (f32(2, n, n, 16), text, f32(2, 2048), f32()), (2, n, n, 16)
        case "SD3ControlNetModel":
            tokens, seen = f32(2, 4096, 2432), f32(2, 128, 128, 16)
            return (tokens, seen, None, f32(2, 2048), f32()), (19, 2, 4096, 2432)
        case "PixArtTransformer2DModel":
            n, text = c.sample_size, f32(2, 300, c.caption_channels)
            added = {"resolution": f32(2, 2), "aspect_ratio": f32(2, 1)}
            return (f32(2, n, n, 4), text, f32(), added, f32(2, 300)), (2, n, n, 8)
        case "PriorTransformer":
            d = c.embedding_dim
            return (f32(2, d), f32(), f32(2, d), f32(2, 77, d), jax.ShapeDtypeStruct((2, 77), bool)), (2, d)
        case "SiglipVisionModel":
            return (f32(2, 384, 384, 3),), (2, 27**2, c.hidden_size)
        case "UVit2DModel":
            codes = jax.ShapeDtypeStruct((2, c.sample_size, c.sample_size), jnp.int32)
            return (codes, f32(2, 77, 768), f32(2, 768), f32(2, 5)), (*codes.shape, 8192)
        case "LDMBertModel":
            return (jax.ShapeDtypeStruct((2, 77), jnp.int32),), (2, 77, c.d_model)
        case "T5EncoderModel" | "UMT5EncoderModel":
            ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)
            return (ids, jax.ShapeDtypeStruct(ids.shape, bool)), (*ids.shape, c.d_model)
        case "AutoencoderKL":
            return (f32(1, 512, 512, 3),), (1, 512, 512, 3)
    return (jax.ShapeDtypeStruct((2, 77), jnp.int32),), (2, 77, c.hidden_size)


@pytest.mark.parametrize("name", COMPONENTS)
def test_full_size_call(name):
    class_name, config = COMPONENTS[name]
    spec = getattr(flaxdiff, class_name).from_config(config)
    args, shape = call(spec)
    out = jax.eval_shape(lambda params, args: flaxdiff.apply(spec, params, *args), flaxdiff.abstract(spec), args)
    out = getattr(out, "last_hidden_state", getattr(out, "controlnet_block_samples", out))
    assert out.shape == shape


# --- what a model refuses --------------------------------------------------------------------------------------------


def test_unknown_option():
    with pytest.raises(ValueError, match="no option 'block_out_chanels'.*did you mean block_out_channels"):
        flaxdiff.UNet2DConditionModel.from_config({"block_out_chanels": [32, 64]})


def test_an_unknown_option_that_is_off_changes_nothing():
    config = {"cross_attention_dim": 16, "some_future_switch": False}
    assert flaxdiff.UNet2DConditionModel.from_config(config).config.cross_attention_dim == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported; use one of"),
        (
            {"down_block_types": ["KDownBlock2D"] + ["DownBlock2D"] * 3},
            r"down_block_types holds \['DownBlock2D'\]; supported are \['KCrossAttnDownBlock2D', 'KDownBlock2D'\]",
        ),
        (
            CROWSON | {"block_out_channels": [16, 32, 32, 32], "attention_head_dim": 16},
            "multiples of 32 channels, not 16 and 16",
        ),
        ({"down_block_types": ["Down"] * 4}, r"down_block_types holds \['Down'\]; supported are"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types has 1 entries and block_out_channels 4"),
        ({"attention_head_dim": [5, 10]}, r"attention_head_dim=\(5, 10\) needs 4 entries"),
        ({"norm_num_groups": 7}, "320 channels do not divide into 7 groups"),
    ],
)
def test_bad_configuration(config, message):
    with pytest.raises(ValueError, match=message):
        flaxdiff.abstract(flaxdiff.UNet2DConditionModel.from_config(config))


def test_missing_parameter():
    spec = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [32]})
    params = flaxdiff.init(spec, jax.random.key(0))
    params.pop("encoder.conv_in.weight")
    with pytest.raises(ValueError, match="1 of .* parameters are missing, e.g. .*encoder.conv_in.weight"):
        flaxdiff.apply(spec, params, jnp.zeros((1, 4, 4, 3)))


def test_sdxl_needs_its_conditions():
    spec = flaxdiff.UNet2DConditionModel.from_config(peers.stable_diffusion_xl().unet.config)
    with pytest.raises(ValueError, match="added_cond_kwargs with text_embeds and time_ids"):
        jax.eval_shape(
            lambda p: flaxdiff.apply(spec, p, jnp.zeros((1, 8, 8, 4)), 1, jnp.zeros((1, 5, 32))),
            flaxdiff.abstract(spec),
        )


# --- kinds of computation --------------------------------------------------------------------------------------------


def test_attention_in_slices_is_attention():
    from flaxdiff.core import attention_backend
    from flaxdiff.nn.attention import attention

    q, k, v = normal(2, 1024, 3, 8), normal(2, 77, 3, 8), normal(2, 77, 3, 8)
    plain = attention(q, k, v)
    token = attention_backend.set("sliced")
    try:
        assert peers.relative(attention(q, k, v), plain) < 1e-5
    finally:
        attention_backend.reset(token)


def test_half_precision_is_near():
    spec, params, _ = load(peers.stable_diffusion_1, "unet")
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    x, text = normal(1, 8, 8, 4), normal(1, 5, 16)
    full = flaxdiff.apply(spec, params, x, 500, text)
    low = flaxdiff.apply(spec, half, x, 500, text)
    assert low.dtype == jnp.bfloat16
    assert 0 < peers.relative(low.astype(jnp.float32), full) < 0.05


def test_init_depends_on_the_name_alone():
    small = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [32]})
    large = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [32], "layers_per_block": 2})
    a, b = (flaxdiff.init(spec, jax.random.key(0)) for spec in (small, large))
    shared = [name for name in a if name in b and a[name].shape == b[name].shape]
    assert len(shared) == len(a) and all((a[name] == b[name]).all() for name in shared)
