"""Encoders of texts and pictures that transformers has, against PyTorch's classes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import safetensors.numpy
import torch
import transformers

import flaxdiff
from flaxdiff.checkpoint import convert
from flaxdiff.models import qwen2_5_vl
from flaxdiff.nn.rope import frequencies

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)


def moved(model):
    """Large weights, and biases and scales that are not those of the first day."""
    model = peers.lively(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn(p.shape))
    return model


def loaded(peer, folder, **options):
    peer.save_pretrained(folder)
    spec, params = getattr(flaxdiff, type(peer).__name__).from_pretrained(folder, **options)
    return spec, params, jax.jit(lambda params, *args: flaxdiff.apply(spec, params, *args))


SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2)


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False])
def test_siglip(head, tmp_path):
    config = transformers.SiglipVisionConfig(
        **SMALL, intermediate_size=24, image_size=32, patch_size=8, vision_use_head=head
    )
    peer = moved(transformers.SiglipVisionModel(config))
    spec, params, run = loaded(peer, tmp_path, scan_layers=head)
    pixels = normal(2, 32, 32, 3)
    with torch.no_grad():
        theirs = peer(peers.nchw(pixels), output_hidden_states=True)
    ours = run(params, pixels)
    assert peers.relative(ours.last_hidden_state, theirs.last_hidden_state, "SiglipVisionModel") < 1e-4
    assert peers.relative(ours.hidden_states, torch.stack(theirs.hidden_states), "SiglipVisionModel") < 1e-4
    if head:
        assert peers.relative(ours.pooler_output, theirs.pooler_output, "SiglipVisionModel") < 1e-4
    assert head or ours.pooler_output is None
    with pytest.raises(ValueError, match="reads pictures of 32 x 32 pixels"):
        flaxdiff.apply(spec, params, pixels[:, :16])


@pytest.mark.parametrize("name", ["Dinov2", "Dinov2WithRegisters"])
@pytest.mark.parametrize("gated", [True, False])
def test_dinov2(name, gated, tmp_path):
    """Of the size that the positions are for, and of others."""
    config = getattr(transformers, f"{name}Config")(**SMALL, image_size=42, patch_size=14, use_swiglu_ffn=gated)
    peer = moved(getattr(transformers, f"{name}Model")(config))
    spec, params, run = loaded(peer, tmp_path, scan_layers=gated)
    for shape in ((2, 42, 42, 3), (1, 28, 70, 3)) if gated else ((2, 42, 42, 3),):
        pixels = normal(*shape)
        with torch.no_grad():
            theirs = peer(peers.nchw(pixels), output_hidden_states=True)
        ours = run(params, pixels)
        for key in ("last_hidden_state", "pooler_output"):
            assert peers.relative(getattr(ours, key), getattr(theirs, key), f"{name}Model") < 1e-4
        assert peers.relative(ours.hidden_states, torch.stack(theirs.hidden_states), f"{name}Model") < 1e-4
    with pytest.raises(ValueError, match="40 x 42 pixels do not divide into patches of 14"):
        flaxdiff.apply(spec, params, normal(1, 40, 42, 3))


# --- texts -----------------------------------------------------------------------------------------------------------

IDS, SEEN = rng.integers(3, 50, (2, 9), np.int32), np.arange(9) < np.array([[9], [6]])


def test_bert(tmp_path):
    config = transformers.BertConfig(**SMALL, vocab_size=50, intermediate_size=24)
    peer = moved(transformers.BertModel(config))
    spec, params, run = loaded(peer, tmp_path)
    kinds = np.int32(np.arange(9) > 4) * np.ones((2, 1), np.int32)
    with torch.no_grad():
        theirs = peer(*map(torch.tensor, (IDS, SEEN, kinds)), output_hidden_states=True)
    ours = run(params, IDS, SEEN, kinds)
    assert peers.relative(ours.pooler_output, theirs.pooler_output, "BertModel") < 1e-4
    hidden = torch.stack(theirs.hidden_states)
    for row, n in enumerate(SEEN.sum(1)):
        assert peers.relative(ours.hidden_states[:, row, :n], hidden[:, row, :n], "BertModel") < 1e-4


TEXT = SMALL | dict(vocab_size=50, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
TEXT |= dict(num_hidden_layers=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
NEAR = dict(sliding_window=4)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500.0)
LLAMA3 |= dict(original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=1000.0)
LINEAR = {"full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6)}
MODELS = [
    ("Llama", "LlamaModel", dict(attention_bias=True)),
    ("Llama", "LlamaForCausalLM", dict(rope_parameters=LLAMA3, max_position_embeddings=512)),
    ("Mistral", "MistralModel", NEAR | dict(rope_parameters=YARN, max_position_embeddings=128)),
    ("Mistral", "MistralModel", dict(sliding_window=None)),
    ("Qwen2", "Qwen2Model", NEAR | dict(use_sliding_window=True, max_window_layers=2)),
    ("Qwen3", "Qwen3Model", {}),
    ("Qwen3", "Qwen3ForCausalLM", dict(attention_bias=True)),
    ("Gemma", "GemmaModel", {}),
    ("Gemma", "GemmaForCausalLM", {}),
    ("Gemma2", "Gemma2Model", NEAR | dict(attn_logit_softcapping=0.5, query_pre_attn_scalar=12)),
    ("Gemma3Text", "Gemma3TextModel", NEAR | dict(sliding_window_pattern=2, rope_parameters=LINEAR)),
    ("Glm", "GlmModel", {}),
    ("SmolLM3", "SmolLM3Model", NEAR | dict(use_sliding_window=True)),
    ("SmolLM3", "SmolLM3ForCausalLM", dict(no_rope_layers=[0, 1, 1, 0])),
]


def text_model(family, name, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TEXT | options, attn_implementation="eager")
    return moved(getattr(transformers, name)(config))


def same(ours, theirs, name):
    """Where there are words; padding sees what it likes."""
    hidden = torch.stack(theirs.hidden_states)
    for row, n in enumerate(SEEN.sum(1)):
        assert peers.relative(ours.hidden_states[:, row, :n], hidden[:, row, :n], name) < 1e-4
        assert peers.relative(ours.last_hidden_state[row, :n], hidden[-1, row, :n], name) < 1e-4


@pytest.mark.parametrize(("family", "name", "options"), MODELS)
def test_language_models(family, name, options, tmp_path):
    peer = text_model(family, name, options)
    spec, params, run = loaded(peer, tmp_path, scan_layers=not options)
    with torch.no_grad():
        theirs = peer(torch.tensor(IDS), torch.tensor(SEEN), output_hidden_states=True)
    same(run(params, IDS, SEEN), theirs, name)


LINES = dict(rope_type="linear", factor=8.0)
OLD = [  # as published before transformers 5
    ("Llama", "LlamaModel", dict(rope_theta=5e5, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})),
    ("Gemma2", "Gemma2Model", dict(rope_theta=1e4)),
    ("Gemma3Text", "Gemma3TextModel", dict(rope_theta=1e6, rope_local_base_freq=100.0, rope_scaling=LINES)),
    ("Gemma3Text", "Gemma3TextModel", {}),
    ("Glm", "GlmModel", dict(rope_theta=5e3, partial_rotary_factor=0.25)),
    ("SmolLM3", "SmolLM3Model", {}),
    (
        "Qwen2_5_VLText",
        "Qwen2_5_VLForConditionalGeneration",
        dict(rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24])),
    ),
]


@pytest.mark.parametrize(("family", "name", "options"), OLD)
def test_older_configurations_turn_alike(family, name, options):
    peer = getattr(transformers, f"{family}Config")(
        **{k: dict(v) if isinstance(v, dict) else v for k, v in options.items()}
    )
    ours = getattr(flaxdiff, name).from_config(options).config
    for kind in ("full_attention", "sliding_attention"):
        theirs = peer.rope_parameters.get(kind, peer.rope_parameters)
        np.testing.assert_array_equal(frequencies(64, ours.rope(kind))[0], frequencies(64, theirs)[0])
        for key in ("partial_rotary_factor", "mrope_section"):
            assert list(np.ravel(ours.rope(kind).get(key, 1.0))) == list(np.ravel(theirs.get(key, 1.0)))


def test_an_unknown_turn():
    with pytest.raises(ValueError, match="rope_type='spiral' is not known; use one of"):
        frequencies(8, dict(rope_theta=1e4, rope_type="spiral"))


VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32)
MROPE = dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=100.0))
OF_PICTURES = {
    "Qwen2_5_VLForConditionalGeneration": dict(
        text_config={k: v for k, v in (TEXT | MROPE).items() if k != "head_dim"} | dict(hidden_size=32),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32),
    ),
    "Gemma3ForConditionalGeneration": dict(
        text_config=TEXT | NEAR, vision_config=VISION | dict(patch_size=8), mm_tokens_per_image=4
    ),
    "Mistral3ForConditionalGeneration": dict(
        text_config=TEXT | dict(model_type="mistral"),
        vision_config=VISION | dict(model_type="pixtral", patch_size=16, head_dim=8),
    ),
}


SPLIT = {  # class -> what makes channels of its own on each device, and what adds up over devices
    "BertModel": (r"self\.(query|key|value)|intermediate\.dense", r"output\.dense"),
    "Dinov2Model": (r"attention\.(query|key|value)|fc1", r"output\.dense|fc2"),
    "LlamaModel": (r"[qkv]_proj|gate_proj|up_proj|embed_tokens", r"o_proj|down_proj"),
    "SiglipVisionModel": (r"[qkv]_proj|fc1", r"layers.*out_proj|head\.attention\.out_proj|fc2"),
}


@pytest.mark.parametrize("name", SPLIT)
def test_tensors_are_split_in_pairs(name):
    shapes = flaxdiff.abstract(getattr(flaxdiff, name).from_config(dict(num_hidden_layers=2)))
    mesh = flaxdiff.make_mesh({"tensor": 2}, jax.devices()[:2])
    first, second = ({k for k in shapes if re.search(rf"({names})\.weight$", k)} for names in SPLIT[name])
    for k, place in flaxdiff.shardings(shapes, mesh).items():
        if k.endswith("weight") and len(shapes[k].shape) > 1:
            spec = [*place.spec, *[None] * (len(shapes[k].shape) - len(place.spec))]
            assert (spec[-1] == "tensor") == (k in first) and (spec[-2] == "tensor") == (k in second), k


@pytest.mark.parametrize("name", OF_PICTURES)
def test_language_models_that_read_pictures(name, tmp_path):
    """Their halves for texts, from files as they are published and as the class is built today."""
    torch.manual_seed(0)
    config = getattr(transformers, name.replace("ForConditionalGeneration", "Config"))(**OF_PICTURES[name])
    peer = moved(getattr(transformers, name)(config))
    spec, params, run = loaded(peer, tmp_path)
    ids, seen = torch.tensor(IDS), torch.tensor(SEEN)
    with torch.no_grad():
        theirs = peer(input_ids=ids, attention_mask=seen, output_hidden_states=True)
    same(run(params, IDS, SEEN), theirs, name)
    if "Qwen" in name:  # whose tokens of pictures stand in rows and columns
        places = rng.integers(0, 20, (3, 2, 9))
        with torch.no_grad():
            inside = peer.model.language_model
            theirs = inside(ids, seen, torch.tensor(places), output_hidden_states=True)
        same(run(params, IDS, SEEN, places), theirs, name)
    flaxdiff.save(tmp_path / "again", spec, params)
    transformers.AutoConfig.from_pretrained(tmp_path / "again")
    again, read = type(peer).__name__, safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert getattr(flaxdiff, again).from_pretrained(tmp_path / "again")[0] == spec
    state = {k: v.numpy() for k, v in peer.state_dict().items()}
    inside = {"model.language_model.": spec.module.renames[0][1], "model.visual.": "visual."}
    renamed = {functools.reduce(lambda k, old: k.replace(old, inside[old]), inside, k): v for k, v in state.items()}
    assert all(np.array_equal(renamed[k], v) for k, v in read.items())
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    for k, v in spec.module.from_pretrained(tmp_path)[1].items():
        assert np.array_equal(v, params[k])


@pytest.mark.parametrize("sides", [((56, 84), (140, 28)), ((112, 140), (28, 28))])
def test_qwen_looks_at_pictures(sides, tmp_path):
    """Of sizes that windows do not divide, two of them among the words of one text."""
    torch.manual_seed(0)
    text = {k: v for k, v in (TEXT | MROPE).items() if k != "head_dim"} | dict(hidden_size=32)
    vision = dict(depth=3, hidden_size=32, intermediate_size=24, num_heads=2, out_hidden_size=32, window_size=56)
    vision |= dict(fullatt_block_indexes=[1])
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=9)
    peer = moved(transformers.Qwen2_5_VLForConditionalGeneration(config))
    spec, params, run = loaded(peer, tmp_path)
    images = [normal(1, *side, 3) for side in sides]
    grids = [tuple(n // 28 for n in side) for side in sides]
    flat, tokens = [], []
    for image in images:
        h, w = (n // 28 for n in image.shape[1:3])
        a = image.reshape(h, 2, 14, w, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)  # units, patches, channels, pixels
        flat.append(torch.tensor(np.repeat(a.reshape(-1, 3, 1, 14, 14), 2, 2).reshape(-1, 3 * 2 * 14 * 14)))
        tokens.append(jax.jit(lambda params, x: flaxdiff.apply(spec, params, x, method="look"))(params, image))
    grid = torch.tensor([[1, 2 * h, 2 * w] for h, w in grids])
    with torch.no_grad():
        seen = peer.model.visual(torch.cat(flat), grid_thw=grid).pooler_output
    assert peers.relative(jnp.concatenate(tokens, 1)[0], seen, type(peer).__name__) < 1e-4

    words = [5, 6] + [9] * (grids[0][0] * grids[0][1]) + [7] + [9] * (grids[1][0] * grids[1][1]) + [8, 10]
    ids, mask = np.array([words + [3] * 2]), np.arange(len(words) + 2)[None] < len(words)
    with torch.no_grad():
        theirs = peer(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            pixel_values=torch.cat(flat),
            image_grid_thw=grid,
            mm_token_type_ids=torch.tensor(ids == 9).int(),
            output_hidden_states=True,
        )
    places = qwen2_5_vl.positions(ids, mask, grids, 9)
    ours = run(params, ids, mask, places, jnp.concatenate(tokens, 1))
    theirs, n = torch.stack(theirs.hidden_states), len(words)
    assert peers.relative(ours.hidden_states[:, :, :n], theirs[:, :, :n], type(peer).__name__) < 1e-4
    with pytest.raises(ValueError, match="Pictures of 30 x 28 pixels; give multiples of 28"):
        flaxdiff.apply(spec, params, normal(1, 30, 28, 3), method="look")


# --- full size -------------------------------------------------------------------------------------------------------

SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
of = lambda *sizes, **more: dict(zip(SIZES.split(), sizes)) | more
PUBLISHED = {  # name -> class, configuration
    "Flux Redux": ("SiglipVision", of(None, 1152, 4304, 27, 16, image_size=384, patch_size=14)),
    "facebook/dinov2-base": ("Dinov2", dict(image_size=518)),
    "facebook/dinov2-giant": (
        "Dinov2",
        dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, image_size=518, use_swiglu_ffn=True),
    ),
    "facebook/dinov2-with-registers-base": ("Dinov2WithRegisters", dict(image_size=518, patch_size=14)),
    "google-bert/bert-base-uncased": ("Bert", {}),
    "meta-llama/Llama-3.1-8B": ("Llama", of(128256, 4096, 14336, 32, 32, 8, 128)),
    "google/gemma-2b": ("Gemma", of(256000, 2048, 16384, 18, 8, 1, 256)),
    "google/gemma-2-2b": ("Gemma2", {}),
    "google/gemma-3-12b": ("Gemma3Text", of(262208, 3840, 15360, 48, 16, 8, 256, sliding_window=1024)),
    "Qwen/Qwen2.5-7B": ("Qwen2", of(152064, 3584, 18944, 28, 28, 4)),
    "Qwen/Qwen3-4B": ("Qwen3", of(151936, 2560, 9728, 36, 32, 8, 128)),
    "mistralai/Mistral-Small-3.1-24B": ("Mistral", of(131072, 5120, 32768, 40, 32, 8, 128, sliding_window=None)),
    "zai-org/glm-4-9b": ("Glm", {}),
    "HuggingFaceTB/SmolLM3-3B": ("SmolLM3", {}),
}
IN_FILES = {  # today's attributes -> names in files
    r"attention\.(q|k|v)_proj": lambda m: "attention.attention." + dict(q="query", k="key", v="value")[m[1]],
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.down_proj": "mlp.weights_out",
    r"mlp\.(gate|up)_proj": "mlp.weights_in",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size(name):
    """Names and shapes are those of PyTorch's class, and a call computes, without memory."""
    kind, config = PUBLISHED[name]
    with torch.device("meta"):
        given = {k: v for k, v in config.items() if v is not None or k == "sliding_window"}
        theirs = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**given)).state_dict()
    theirs = {k: tuple(v.shape) for k, v in theirs.items()}
    if kind == "SiglipVision":
        theirs = {f"vision_model.{k}": shape for k, shape in theirs.items()}
    if "Dinov2" in kind:
        doubled = {k for k in theirs if ".gate_proj." in k}
        theirs = {k: (2 * shape[0], *shape[1:]) if k in doubled else shape for k, shape in theirs.items()}
        for old, new in IN_FILES.items():
            theirs = {re.sub(old, new, k): shape for k, shape in theirs.items() if ".up_proj." not in k}
    spec = getattr(flaxdiff, f"{kind}Model").from_config(given)
    leaves = flaxdiff.layout(spec).items()
    assert {n: convert.shape_in_file(leaf) for own, leaf in leaves for n in convert.names_in_file(own, leaf)} == theirs
    side = getattr(spec.config, "image_size", None)
    read = jax.ShapeDtypeStruct((2, 8192), np.int32) if side is None else jax.ShapeDtypeStruct((2, side, side, 3), "f4")
    run = lambda params, read: flaxdiff.apply(spec, params, read)
    out = jax.eval_shape(run, flaxdiff.abstract(spec, "bfloat16"), read)
    assert out.hidden_states.shape[0] == spec.config.num_hidden_layers + 1
    assert out.last_hidden_state.dtype == "bfloat16" and out.last_hidden_state.shape[-1] == spec.config.hidden_size


def test_qwen_at_full_size():
    """Qwen/Qwen2.5-VL-7B-Instruct."""
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    config = dict(text_config=of(152064, 3584, 18944, 28, 28, 4), vision_config=vision)
    with torch.device("meta"):
        theirs = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**config)).state_dict()
    theirs = {
        k.replace("model.language_model", "model").replace("model.visual", "visual"): v for k, v in theirs.items()
    }
    spec = flaxdiff.Qwen2_5_VLForConditionalGeneration.from_config(config)
    leaves = flaxdiff.layout(spec).items()
    ours = {n: convert.shape_in_file(leaf) for own, leaf in leaves for n in convert.names_in_file(own, leaf)}
    assert ours == {k: tuple(v.shape) for k, v in theirs.items() if k != "lm_head.weight"}
    look = lambda params, x: flaxdiff.apply(spec, params, x, method="look")
    pixels = jax.ShapeDtypeStruct((1, 1036, 1372, 3), np.float32)
    assert jax.eval_shape(look, flaxdiff.abstract(spec, "bfloat16"), pixels).shape == (1, 37 * 49, 3584)
