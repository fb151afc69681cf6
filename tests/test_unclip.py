"""unCLIP against PyTorch's: priors, what stands between CLIP and the denoisers, and the pipelines of several loops."""

import json

import diffusers
import jax
import numpy as np
import peers
import pytest
import torch
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image

import flaxdiff
from flaxdiff.memory import residency
from flaxdiff.pipelines.tasks import blank_inputs
from flaxdiff.planning.plan import pipeline as planned

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)


def drawn(model, seed=0):
    """A model all of whose parameters are drawn, those too that begin at zero or one."""
    peers.lively(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name in ("mean", "std", "clip_mean", "clip_std"):
                p.normal_(mean=float("norm" in name or "std" in name), std=0.3)
    return model


def saved(model, folder, name):
    """A PyTorch model, saved and loaded here."""
    model.save_pretrained(folder)
    return getattr(flaxdiff, name).from_pretrained(folder)


# --- networks --------------------------------------------------------------------------------------------------------

SMALL = dict(num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=12, num_embeddings=7)
SHAP_E = SMALL | dict(  # a row of tokens, no text, places for the sample alone
    additional_embeddings=0,
    norm_in_type="layer",
    embedding_proj_norm_type="layer",
    encoder_hid_proj_type=None,
    added_emb_type=None,
    time_embed_act_fn="gelu",
    time_embed_dim=20,
    embedding_proj_dim=10,
    clip_embed_dim=14,
)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_prior_transformer(scan, masked, tmp_path):
    peer = drawn(diffusers.PriorTransformer(**SMALL))
    saved(peer, tmp_path, "PriorTransformer")
    spec, params = flaxdiff.PriorTransformer.from_pretrained(tmp_path, scan_layers=scan)
    x, t, told, text = normal(2, 12), np.float32([3, 981]), normal(2, 12), normal(2, 7, 12)
    mask = np.arange(7) < np.array([[3], [7]]) if masked else None
    with torch.no_grad():
        there = None if mask is None else torch.tensor(mask)
        theirs = peer(*map(torch.tensor, (x, t, told, text)), there).predicted_image_embedding
        processed = peer.post_process_latents(theirs)
    ours = flaxdiff.apply(spec, params, x, t, told, text, mask)
    assert peers.relative(ours, theirs, of="PriorTransformer") < 1e-5
    ours = flaxdiff.apply(spec, params, ours, method="post_process_latents")
    assert peers.relative(ours, processed, of="PriorTransformer") < 1e-5
    with pytest.raises(ValueError, match="reads a text: give encoder_hidden_states"):
        flaxdiff.apply(spec, params, x, t, told)


def test_prior_transformer_of_rows(tmp_path):
    peer = drawn(diffusers.PriorTransformer(**SHAP_E))
    spec, params = saved(peer, tmp_path, "PriorTransformer")
    x, t, told = normal(2, 7, 12), np.float32([3, 981]), normal(2, 10)
    with torch.no_grad():
        theirs = peer(*map(torch.tensor, (x, t, told))).predicted_image_embedding
    assert theirs.shape == (2, 7, 14)
    assert peers.relative(flaxdiff.apply(spec, params, x, t, told), theirs, of="PriorTransformer") < 1e-5


def test_text_projection(tmp_path):
    config = dict(clip_extra_context_tokens=3, clip_embeddings_dim=12, time_embed_dim=20, cross_attention_dim=16)
    peer = drawn(UnCLIPTextProjModel(**config))
    spec, params = saved(peer, tmp_path, "UnCLIPTextProjModel")
    image, pooled, text = normal(2, 12), normal(4, 12), normal(4, 5, 12)
    there = dict(zip(("image_embeddings", "prompt_embeds", "text_encoder_hidden_states"), (image, pooled, text)))
    with torch.no_grad():
        there = {k: torch.tensor(v) for k, v in there.items()}
        theirs = peer(**there, do_classifier_free_guidance=True)
    for picture, rows in ((None, slice(2)), (image, slice(2, 4))):
        ours = flaxdiff.apply(spec, params, picture, pooled[rows], text[rows])
        for mine, other in zip(ours, theirs, strict=True):
            assert peers.relative(mine, other[rows], of="UnCLIPTextProjModel") < 1e-5


def test_image_normalizer(tmp_path):
    peer = drawn(StableUnCLIPImageNormalizer(embedding_dim=12))
    spec, params = saved(peer, tmp_path, "StableUnCLIPImageNormalizer")
    embeds = normal(2, 12)
    for method in ("scale", "unscale"):
        with torch.no_grad():
            theirs = getattr(peer, method)(torch.tensor(embeds))
        ours = flaxdiff.apply(spec, params, embeds, method=method)
        assert peers.relative(ours, theirs, of="StableUnCLIPImageNormalizer") < 1e-5


DECODER = dict(
    sample_size=8,
    in_channels=3,
    out_channels=6,
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    block_out_channels=(16, 32, 48),
    layers_per_block=2,
    norm_num_groups=8,
    cross_attention_dim=20,
    attention_head_dim=16,
    resnet_time_scale_shift="scale_shift",
    class_embed_type="identity",
)


@pytest.mark.parametrize(
    ("only", "masked"), [(False, True), (False, False), (True, False), ((False, True, False), False)]
)
def test_decoder(only, masked, tmp_path):
    """Single attentions to text and picture at once, and what is added to the time."""
    peer = drawn(diffusers.UNet2DConditionModel(**DECODER, only_cross_attention=only))
    spec, params = saved(peer, tmp_path, "UNet2DConditionModel")
    x, t, text, told = normal(2, 8, 12, 3), np.float32([3, 981]), normal(2, 5, 20), normal(2, 64)
    mask = np.arange(5) < np.array([[3], [5]]) if masked else None
    with torch.no_grad():
        there = {"class_labels": torch.tensor(told), "attention_mask": None if mask is None else torch.tensor(mask)}
        theirs = peer(peers.nchw(x), torch.tensor(t), torch.tensor(text), **there).sample
    ours = flaxdiff.apply(spec, params, x, t, text, class_labels=told, attention_mask=mask)
    assert peers.relative(ours, peers.nhwc(theirs), of="UNet2DConditionModel") < 1e-5
    with pytest.raises(ValueError, match="conditioned on an embedding: give class_labels"):
        flaxdiff.apply(spec, params, x, t, text)


def test_unet_told_an_embedding(tmp_path):
    """As Stable unCLIP's: a network projects what is added to the time."""
    options = dict(class_embed_type="projection", projection_class_embeddings_input_dim=40)
    peer = drawn(peers.unet(**options))
    spec, params = saved(peer, tmp_path, "UNet2DConditionModel")
    x, t, text, told = normal(2, 8, 8, 4), np.float32([3, 981]), normal(2, 5, 16), normal(2, 40)
    with torch.no_grad():
        theirs = peer(peers.nchw(x), torch.tensor(t), torch.tensor(text), class_labels=torch.tensor(told)).sample
    ours = flaxdiff.apply(spec, params, x, t, text, class_labels=told)
    assert peers.relative(ours, peers.nhwc(theirs), of="UNet2DConditionModel") < 1e-5
    with pytest.raises(ValueError, match="attention_mask is for U-Nets of SimpleCrossAttn stages"):
        flaxdiff.apply(spec, params, x, t, text, class_labels=told, attention_mask=np.ones((2, 5)))


# --- Stable unCLIP ---------------------------------------------------------------------------------------------------

PICTURES = rng.random((2, 40, 32, 3), np.float32)
NOISED = 5  # what the key of the noise on the embedding is folded with


def load(build):
    """PyTorch's pipeline, and ours of what it saves."""
    peer = build()
    peer.set_progress_bar_config(disable=True)
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(build))
    assert type(pipe).__name__ == type(peer).__name__
    return pipe.replace(progress=False), params, peer


def stable(width):
    """The parts that both pipelines of Stable unCLIP have, for embeddings of so many numbers."""
    return dict(
        image_normalizer=drawn(StableUnCLIPImageNormalizer(embedding_dim=width)),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=peers.tokenizer("!"),
        text_encoder=peers.text_encoder(hidden_act="gelu"),
        unet=peers.unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * width),
        scheduler=diffusers.DDIMScheduler(**peers.SD_BETAS, prediction_type="v_prediction", clip_sample=False),
        vae=peers.vae(),
    )


def stable_unclip_img2img():
    processor = transformers.CLIPImageProcessorPil(size=32, crop_size=32)
    parts = dict(feature_extractor=processor, image_encoder=peers.image_encoder())
    return diffusers.StableUnCLIPImg2ImgPipeline(**parts, **stable(20))


def noise_of(key, index, *shape, fold):
    """What the key of a picture gives under a number."""
    key = jax.random.split(jax.random.fold_in(key, index))[0]
    return np.asarray(jax.random.normal(jax.random.fold_in(key, fold), shape))


@pytest.mark.parametrize(
    ("options", "embedded"),
    [
        (dict(prompt=["cat", "red dog"], negative_prompt=["a", "b"], noise_level=300), False),
        (dict(noise_level=0, guidance_scale=1.0), True),
    ],
)
def test_stable_unclip_img2img(options, embedded, monkeypatch, tmp_path):
    pipe, params, peer = load(stable_unclip_img2img)
    options = dict(num_inference_steps=3, height=16, width=16) | options
    drawn = np.stack([noise_of(KEY, i, 20, fold=NOISED) for i in range(2)])
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.tensor(drawn))
    latents, embeds = normal(2, 8, 8, 4), normal(2, 20)
    seen = [Image.fromarray(np.uint8(255 * picture)) for picture in PICTURES]
    there = dict(image_embeds=torch.tensor(embeds), prompt=["", ""]) if embedded else dict(image=seen)
    with torch.no_grad():
        theirs = peer(**there | options, latents=peers.nchw(latents), output_type="np").images
    here = dict(image_embeds=embeds) if embedded else dict(image=seen)
    made = pipe(params, KEY, **here, **options, latents=latents, output_type="np").images
    assert peers.relative(made, theirs, of="StableUnCLIPImg2ImgPipeline") < 1e-3
    flaxdiff.save(tmp_path, pipe, params)
    again, _ = flaxdiff.load(tmp_path)
    assert again.specs == pipe.specs and again.image_noising_scheduler == pipe.image_noising_scheduler
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["image_normalizer"] == ["stable_diffusion", "StableUnCLIPImageNormalizer"]


def prior(width=24, tokens=16):
    """A prior of embeddings of so many numbers."""
    return drawn(diffusers.PriorTransformer(**SMALL | dict(embedding_dim=width, num_embeddings=tokens)))


def stable_unclip():
    scheduler = diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    parts = dict(
        prior_tokenizer=peers.tokenizer(),
        prior_text_encoder=peers.text_encoder(projected=True, width=24),
        prior=prior(),
        prior_scheduler=diffusers.DDPMScheduler.from_config(scheduler.config),
    )
    return diffusers.StableUnCLIPPipeline(**parts, **stable(24))


@pytest.mark.parametrize("scales", [(3.0, 4.0), (1.0, 1.0), (2.0, 1.0)])
def test_stable_unclip(scales, monkeypatch, tmp_path):
    """The embedding is found first, by a loop that draws noise, and then brought under some."""
    pipe, params, peer = load(stable_unclip)
    options = dict(prompt=["cat", "red dog"], num_images_per_prompt=2, num_inference_steps=3, height=16, width=16)
    options |= dict(prior_num_inference_steps=4, prior_guidance_scale=scales[0], guidance_scale=scales[1])
    options |= dict(noise_level=50)
    start, latents, steps = normal(4, 24), normal(4, 8, 8, 4), [normal(4, 24) for _ in range(4)]
    under = np.stack([noise_of(KEY, i, 24, fold=NOISED) for i in range(4)])
    monkeypatch.setattr(
        diffusers.pipelines.stable_diffusion.pipeline_stable_unclip, "randn_tensor", lambda *a, **k: torch.tensor(under)
    )
    queue = iter(steps)
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *a, **k: torch.tensor(next(queue)))
    given = dict(prior_latents=torch.tensor(start), latents=peers.nchw(latents))
    with torch.no_grad():
        theirs = peer(**options, **given, output_type="np").images
    inputs = pipe.prepare_inputs(**options, prior_latents=start, latents=latents)
    made = peers.with_noise(pipe, params, inputs, [*steps, *np.zeros((3, 4, 8, 8, 4), np.float32)], KEY)
    assert peers.relative(made, theirs, of="StableUnCLIPPipeline") < 1e-3
    flaxdiff.save(tmp_path, pipe, params)
    again, _ = flaxdiff.load(tmp_path)
    assert again.specs == pipe.specs and again.prior_scheduler == pipe.prior_scheduler
    assert again.program is pipe.program


def test_loops_one_after_the_other():
    """A call, the pure function and the programs compiled ahead make the same of the same key, image by image."""
    pipe, params, _ = load(stable_unclip)
    options = dict(prompt=["cat", "red dog"], num_inference_steps=2, prior_num_inference_steps=3, height=16, width=16)
    made = pipe(params, KEY, **options, output_type="np").images
    inputs = pipe.prepare_inputs(**options)
    np.testing.assert_allclose(jax.jit(pipe.generate)(params, KEY, inputs), made, atol=1e-5)
    programs = pipe.compile(params, inputs)
    np.testing.assert_array_equal(programs.generate(params, KEY, inputs), made)
    sizes = peers.programs()
    found = pipe(params, KEY, **options | dict(prompt=["dog", "red dog"]), output_type="np").images
    assert peers.programs() == sizes
    np.testing.assert_allclose(found[1], made[1], atol=1e-5)
    assert np.abs(found[0] - made[0]).max() > 1e-3
    many = jax.pmap(pipe.generate, devices=jax.devices()[:2])
    spread = many(flaxdiff.replicate(params, 2), flaxdiff.replicate(KEY, 2), flaxdiff.shard(inputs, 2))
    np.testing.assert_allclose(np.concatenate(spread), made, atol=1e-5)


def test_options_of_loops():
    pipe, params, _ = load(stable_unclip)
    options = dict(prompt="cat", prior_num_inference_steps=3, num_inference_steps=2)
    inputs = pipe.by_default(prior_guidance_scale=2.0).prepare_inputs(**options)
    assert inputs["prior"]["guidance"]["guidance_scale"] == 2 and inputs["prior"]["plan"].steps == 3
    assert inputs["guidance"]["guidance_scale"] == 10 and inputs["plan"].steps == 2
    swapped = pipe.replace(prior_scheduler=flaxdiff.DDIMScheduler.from_config(pipe.prior_scheduler))
    assert not swapped.prepare_inputs(**options)["prior"]["plan"].noisy.any()
    with pytest.raises(ValueError, match=r"latents have shape \(1, 20\); expected .B, \*\(24,\)."):
        pipe.prepare_inputs(**options, prior_latents=normal(1, 20))
    with pytest.raises(ValueError, match="no option of plan 'strange'"):
        pipe.prepare_inputs(**options, prior_strange=1)


def test_parts_that_the_folder_does_not_know():
    """The folders of Stable unCLIP are of the pipeline from pictures; the prior is another's."""
    other, params, _ = load(stable_unclip)
    names = "prior", "prior_text_encoder"
    parts = {name: (getattr(other, name), params[name]) for name in names}
    parts |= dict(prior_tokenizer=other.prior_tokenizer, prior_scheduler=other.prior_scheduler)
    pipe, there = flaxdiff.StableUnCLIPPipeline.from_pretrained(peers.saved(stable_unclip_img2img), **parts)
    assert {"prior", "prior_text_encoder", "unet", "image_normalizer"} <= set(there) == set(dict(pipe.specs))
    assert pipe.prepare_inputs(prompt="cat")["prior"]["prompt_ids"].shape == (1, 16)
    with pytest.raises(ValueError, match="StableUnCLIPPipeline needs prior.*prior_text_encoder.*prior_tokenizer"):
        flaxdiff.StableUnCLIPPipeline.from_pretrained(peers.saved(stable_unclip_img2img))


def test_bad_stable_unclip():
    pipe, params, _ = load(stable_unclip_img2img)
    assert len(blank_inputs(pipe, batch=2)["image_pixels"]) == 2
    with pytest.raises(ValueError, match="noise_level=1000 must lie between 0 and 999"):
        pipe.prepare_inputs(image=PICTURES, noise_level=1000)
    with pytest.raises(ValueError, match="needs image or image_embeds, and was given neither"):
        pipe.prepare_inputs(prompt="cat")


# --- Karlo -----------------------------------------------------------------------------------------------------------


def karlo_parts():
    """What both of Karlo's pipelines have."""
    torch.manual_seed(0)
    net = lambda seed: drawn(
        diffusers.UNet2DModel(
            sample_size=20,
            in_channels=6,
            out_channels=3,
            block_out_channels=(16, 32),
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            norm_num_groups=8,
            layers_per_block=1,
            add_attention=False,
        ),
        seed,
    )
    return dict(
        decoder=drawn(diffusers.UNet2DConditionModel(**DECODER)),
        text_encoder=peers.text_encoder(projected=True, width=24),
        tokenizer=peers.tokenizer(),
        text_proj=drawn(
            UnCLIPTextProjModel(
                clip_extra_context_tokens=3, clip_embeddings_dim=24, time_embed_dim=64, cross_attention_dim=20
            )
        ),
        super_res_first=net(1),
        super_res_last=net(2),
        decoder_scheduler=diffusers.UnCLIPScheduler(variance_type="learned_range"),
        super_res_scheduler=diffusers.UnCLIPScheduler(),
    )


def karlo():
    scheduler = diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    return diffusers.UnCLIPPipeline(**karlo_parts(), prior=prior(), prior_scheduler=scheduler)


def karlo_variation():
    config = peers.image_encoder().config
    config.projection_dim = 24
    parts = dict(
        image_encoder=peers.lively(transformers.CLIPVisionModelWithProjection(config)),
        feature_extractor=transformers.CLIPImageProcessorPil(size=32, crop_size=32),
    )
    return diffusers.UnCLIPImageVariationPipeline(**karlo_parts(), **parts)


def drawing(seed):
    """Numbers of a test's own: its first step multiplies what float32 leaves by thousands, where nothing clips."""
    own = np.random.default_rng(seed)
    return lambda *shape: own.standard_normal(shape).astype(np.float32)


def draws(monkeypatch, normal, *loops):
    """Noise for the steps of loops, each (steps, shape), the same for PyTorch's scheduler; it draws none at the end."""
    steps = [[normal(*shape) for _ in range(n)] for n, shape in loops]
    queue = iter([noise for loop in steps for noise in loop[:-1]])
    there = lambda noise: peers.nchw(noise) if noise.ndim == 4 else torch.tensor(noise)
    monkeypatch.setattr(diffusers.schedulers.scheduling_unclip, "randn_tensor", lambda *a, **k: there(next(queue)))
    return [noise for loop in steps for noise in loop]


def exact(peer):
    """A pipeline whose schedulers are sharp: of 1 - alphas_cumprod[0] float32 leaves three digits."""
    for part in peer.components.values():
        if isinstance(part, diffusers.UnCLIPScheduler):
            part.betas = part.betas.double()
            part.alphas_cumprod = torch.cumprod(1 - part.betas, 0)
    return peer


@pytest.mark.parametrize("scales", [(3.0, 4.0), (1.0, 1.0)])
def test_karlo(scales, monkeypatch, tmp_path):
    """Three loops that draw noise, the second with a variance that is learned and not guided."""
    pipe, params, peer, normal, b = *load(karlo), drawing(0), 4
    options = dict(prompt=["cat", "red dog"], num_images_per_prompt=2, prior_num_inference_steps=3)
    options |= dict(decoder_num_inference_steps=4, super_res_num_inference_steps=4)
    options |= dict(prior_guidance_scale=scales[0], decoder_guidance_scale=scales[1])
    start = dict(
        prior_latents=normal(b, 24), decoder_latents=normal(b, 8, 8, 3), super_res_latents=normal(b, 20, 20, 3)
    )
    steps = draws(monkeypatch, normal, (3, (b, 24)), (4, (b, 8, 8, 3)), (4, (b, 20, 20, 3)))
    there = {k: peers.nchw(v) if v.ndim == 4 else torch.tensor(v) for k, v in start.items()}
    with torch.no_grad():
        theirs = exact(peer)(**options, **there, output_type="np").images
    assert ((theirs > 0.01) & (theirs < 0.99)).mean() > 0.15
    made = peers.with_noise(pipe, params, pipe.prepare_inputs(**options, **start), steps)
    assert peers.relative(made, theirs, of="UnCLIPPipeline") < 1e-3
    flaxdiff.save(tmp_path, pipe, params)
    again, _ = flaxdiff.load(tmp_path)
    assert again.program is pipe.program
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        assert getattr(again, name) == getattr(pipe, name) is not None


@pytest.mark.parametrize("embedded", [False, True])
def test_karlo_variation(embedded, monkeypatch):
    pipe, params, peer, normal = *load(karlo_variation), drawing(1)
    options = dict(decoder_num_inference_steps=4, super_res_num_inference_steps=4)
    start = dict(decoder_latents=normal(2, 8, 8, 3), super_res_latents=normal(2, 20, 20, 3))
    steps = draws(monkeypatch, normal, (4, (2, 8, 8, 3)), (4, (2, 20, 20, 3)))
    embeds = normal(2, 24)
    seen = dict(image=[Image.fromarray(np.uint8(255 * picture)) for picture in PICTURES])
    there = dict(image_embeddings=torch.tensor(embeds)) if embedded else seen
    with torch.no_grad():
        given = {k: peers.nchw(v) for k, v in start.items()}
        theirs = exact(peer)(**there, **options, **given, output_type="np").images
    here = dict(image_embeddings=embeds) if embedded else seen
    assert ((theirs > 0.01) & (theirs < 0.99)).mean() > 0.15
    made = peers.with_noise(pipe, params, pipe.prepare_inputs(**here, **options, **start), steps)
    assert peers.relative(made, theirs, of="UnCLIPImageVariationPipeline") < 1e-3


def test_karlo_of_a_text_encoded_before():
    """A call of what the text encoder made is one of the prompt; schedulers are replaced by their own names."""
    pipe, params, _ = load(karlo)
    options = dict(prior_num_inference_steps=2, decoder_num_inference_steps=2, super_res_num_inference_steps=2)
    made = pipe(params, KEY, prompt="red dog", **options).images
    ids = pipe.tokenizer(["red dog"])
    told = flaxdiff.apply(pipe.text_encoder, params["text_encoder"], ids)
    given = dict(text_model_output=(told.text_embeds, told.last_hidden_state))
    mask = np.arange(16) <= np.argmax(ids == ids.max())
    again = pipe(params, KEY, **given, text_attention_mask=mask[None], **options).images
    assert np.abs(np.int32(made[0]) - np.int32(again[0])).max() <= 1 and made[0].size == (20, 20)
    with pytest.raises(ValueError, match="text_model_output needs text_attention_mask beside it"):
        pipe.prepare_inputs(**options, **given)
    with pytest.raises(ValueError, match="needs a prompt or text_model_output, and was given neither"):
        pipe.prepare_inputs(**options)
    swapped = pipe.replace(super_res_scheduler=flaxdiff.DDPMScheduler())
    assert type(swapped.scheduler).__name__ == "DDPMScheduler" and swapped.super_res_scheduler is swapped.scheduler
    assert len(blank_inputs(pipe, batch=3)["index"]) == 3
    assert len(blank_inputs(load(karlo_variation)[0], batch=3)["decoder"]["image_pixels"]) == 3


def test_what_stays_of_several_loops():
    """Each loop has its stages; what two of them use counts in both."""
    pipe, params, _ = load(karlo)
    sizes = {name: sum(a.nbytes for a in params[name].values()) for name in params}
    stages = [["prior"], ["decoder"], ["text_encoder", "text_proj"], ["super_res_first", "super_res_last"]]
    needed = max(sum(sizes[name] for name in stage) for stage in stages)
    assert set(residency(pipe, params, sum(sizes.values())).values()) == {"device"}
    assert "host" in residency(pipe, params, needed).values()
    with pytest.raises(ValueError, match=f"One stage's weights take {needed:,} bytes"):
        residency(pipe, params, needed - 1)
    with pytest.raises(ValueError, match="UnCLIPPipeline runs several loops one after the other, and a plan is of one"):
        planned(peers.saved(karlo))
