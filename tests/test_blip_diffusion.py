"""BLIP-Diffusion against PyTorch's pipelines, whose networks call parts of an older transformers.

Since transformers 5 attention returns no tuple, models have no help with masks, and an encoder does not hear of a
causal mask by its old name; `mended` hands diffusers what it expects.
"""

import functools
import tempfile

import diffusers
import jax
import numpy as np
import peers
import pytest
import test_classic
import torch
import transformers
from diffusers.pipelines.deprecated import blip_diffusion as deprecated
from diffusers.pipelines.deprecated.blip_diffusion import blip_image_processing, modeling_blip2, modeling_ctx_clip
from PIL import Image

import flaxdiff
from flaxdiff.checkpoint import convert

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)
PICTURE = Image.fromarray(rng.integers(0, 255, (24, 40, 3), np.uint8))
EDGES = Image.fromarray(rng.integers(0, 255, (20, 16, 3), np.uint8))
SUBJECT = dict(reference_image=PICTURE, source_subject_category="red apple", target_subject_category="red")


@functools.cache
def mended():
    """diffusers' networks on today's transformers."""
    attention = modeling_blip2.Blip2QFormerAttention
    forward = attention.forward

    def with_tuple(self, x, mask=None, head_mask=None, context=None, context_mask=None, *args, **kwargs):
        return forward(self, x, mask, context, context_mask), None

    attention.forward = with_tuple
    model = modeling_blip2.Blip2QFormerModel
    model.invert_attention_mask = lambda self, mask: None  # which is of ones
    model.get_head_mask = lambda self, mask, layers: [None] * layers
    encoder = modeling_ctx_clip.CLIPEncoder

    class Causal(encoder):
        def forward(self, inputs_embeds, attention_mask=None, causal_attention_mask=None, **kwargs):
            return super().forward(inputs_embeds, attention_mask=causal_attention_mask)

    modeling_ctx_clip.CLIPEncoder = Causal


@functools.cache
def words() -> str:
    """The folder of a tokenizer for subjects."""
    folder = tempfile.mkdtemp()
    test_classic.bert_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def qformer():
    mended()
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28)
    text = dict(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    config = transformers.Blip2Config(vision_config=vision, qformer_config=text, num_query_tokens=5, tokenizer=words())
    return peers.lively(modeling_blip2.Blip2QFormerModel(config))


@functools.cache
def parts():
    mended()
    encoder = modeling_ctx_clip.ContextCLIPTextModel(peers.text_encoder().config).eval()
    scheduler = diffusers.PNDMScheduler(**peers.SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    processor = blip_image_processing.BlipImageProcessor(size={"height": 28, "width": 28})
    return dict(
        tokenizer=peers.tokenizer(),
        text_encoder=peers.lively(encoder),
        vae=peers.vae(),
        unet=peers.unet(),
        scheduler=scheduler,
        qformer=qformer(),
        image_processor=processor,
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.3, 0.4],
    )


@functools.cache
def blip_diffusion():
    return deprecated.BlipDiffusionPipeline(**parts())


@functools.cache
def led_blip_diffusion():
    return diffusers.BlipDiffusionControlNetPipeline(**parts(), controlnet=peers.controlnet(parts()["unet"]))


load = functools.cache(test_classic.load)


def test_q_former():
    """The padding of a shorter name is not seen."""
    peer = qformer()
    spec, params = flaxdiff.Blip2QFormerModel.from_pretrained(peers.saved(blip_diffusion), subfolder="qformer")
    pixels, names = normal(2, 28, 28, 3), ["red apple blue", "book"]
    with torch.no_grad():
        theirs = peer(text_input=names, image_input=peers.nchw(pixels), return_dict=False)
    ids = np.asarray(peer.tokenizer(names, padding="max_length", max_length=8)["input_ids"])
    made = jax.jit(lambda params: flaxdiff.apply(spec, params, ids, ids > 0, pixels))(params)
    assert peers.relative(made, theirs, "Blip2QFormerModel") < 1e-4


def test_q_former_at_full_size():
    """Salesforce/blipdiffusion's."""
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, hidden_act="quick_gelu")
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=dict(vocab_size=30523), num_query_tokens=16, tokenizer=words()
    )
    with torch.device("meta"):
        theirs = modeling_blip2.Blip2QFormerModel(config).state_dict()
    leaves = flaxdiff.layout(flaxdiff.Blip2QFormerModel.from_config(config.to_dict())).items()
    ours = {n: convert.shape_in_file(leaf) for own, leaf in leaves for n in convert.names_in_file(own, leaf)}
    del theirs["embeddings.position_ids"]
    assert ours == {name: tuple(value.shape) for name, value in theirs.items()}


def test_context_clip():
    peer = parts()["text_encoder"]
    spec, params = flaxdiff.ContextCLIPTextModel.from_pretrained(peers.saved(blip_diffusion), subfolder="text_encoder")
    ids, context = rng.integers(0, peers.WORDS, (2, 9), np.int32), normal(2, 5, 16)
    with torch.no_grad():
        alone = peer(input_ids=torch.tensor(ids))[0]
        among = peer(input_ids=torch.tensor(ids), ctx_embeddings=torch.tensor(context), ctx_begin_pos=[3, 3])[0]
    for ours, theirs in (((), alone), ((context, 3), among)):
        made = flaxdiff.apply(spec, params, ids, *ours).last_hidden_state
        assert peers.relative(made, theirs, "ContextCLIPTextModel") < 1e-4


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (blip_diffusion, dict(neg_prompt="blue")),
        (blip_diffusion, dict(prompt_strength=0.5, prompt_reps=3)),
        (led_blip_diffusion, dict(condtioning_image=EDGES)),
    ],
)
def test_blip_diffusion(build, options):
    pipe, params, peer = load(build)
    latents = normal(2, 8, 8, 4)
    options = SUBJECT | dict(prompt=["red", "a b"], num_inference_steps=3, height=16, width=16) | options
    both = {k: [v] * 2 for k, v in options.items() if k.endswith("category")}
    with torch.no_grad():
        theirs = peer(**options | both, latents=peers.nchw(latents), output_type="np").images
    made = pipe(params, KEY, **options, latents=latents, output_type="np").images
    assert peers.relative(made, theirs, of=type(pipe).__name__) < 1e-3


def test_blip_diffusion_is_saved_and_compiled(tmp_path):
    pipe, params, peer = load(blip_diffusion)
    flaxdiff.save(tmp_path, pipe, params)
    again, _ = flaxdiff.load(tmp_path)
    assert again.specs == pipe.specs and dict(again.settings) == dict(pipe.settings)
    read = modeling_blip2.Blip2QFormerModel.from_pretrained(tmp_path / "qformer").state_dict()
    ours = {name: value for name, value in peer.qformer.state_dict().items() if not name.endswith("position_ids")}
    assert all(torch.equal(read[name], value) for name, value in ours.items())
    processor = blip_image_processing.BlipImageProcessor.from_pretrained(tmp_path / "image_processor")
    assert processor.size == {"height": 28, "width": 28}
    options = dict(batch=2, num_inference_steps=2, guidance_scale=1.0)
    programs = pipe.compile(params, **options)
    inputs = pipe.prepare_inputs(prompt=["red"] * 2, num_inference_steps=2, guidance_scale=1.0, **SUBJECT)
    assert programs.generate(params, KEY, inputs).shape[0] == 2


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            blip_diffusion,
            dict(prompt="red"),
            "give reference_image=, source_subject_category=, target_subject_category=",
        ),
        (blip_diffusion, SUBJECT, "needs a prompt"),
        (
            blip_diffusion,
            SUBJECT | dict(prompt=["a"] * 3, source_subject_category=["b"] * 2),
            "2 entries for 3 prompts",
        ),
        (led_blip_diffusion, SUBJECT | dict(prompt="red"), "follows a picture; give condtioning_image="),
    ],
)
def test_what_blip_diffusion_refuses(build, options, message):
    with pytest.raises(ValueError, match=message):
        load(build)[0].prepare_inputs(**options)
