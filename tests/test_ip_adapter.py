"""IP-Adapters against PyTorch's, in whole pipelines: every form, several at once, masks, scales by layer."""

import copy

import diffusers
import jax
import numpy as np
import peers
import pytest
import test_flux as flux
import test_sd3 as sd3
import torch
import transformers
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from PIL import Image
from safetensors.torch import save_file

import flaxdiff

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
picture = lambda size=40: Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8))
KEY = jax.random.key(0)
TEXT = dict(prompt=["a red dog", "cat"], negative_prompt=["ugly", "ugly"], num_inference_steps=3, guidance_scale=5.0)
BASES = {"1": peers.stable_diffusion_1, "XL": peers.stable_diffusion_xl}


def write(state, path):
    """A state dict as a file, flat in safetensors and nested in a pickle."""
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file({f"{part}.{k}": t.contiguous() for part, ts in state.items() for k, t in ts.items()}, path)
    return path


def pair(base, folder, *kinds, format="safetensors", **options):
    """A pipeline with IP-Adapters, here and there."""
    peer = BASES[base]()
    states = [peers.ip_adapter(kind, peer.unet, seed) for seed, kind in enumerate(kinds)]
    peer.image_encoder = peers.image_encoder()
    peer.feature_extractor = transformers.CLIPImageProcessorPil(size=32, crop_size=32)
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    peer.text_encoder.__dict__["text_model"] = peer.text_encoder  # diffusers looks for it where transformers 4 had it
    peer.image_encoder.save_pretrained(folder / "image_encoder")
    pipe, params = flaxdiff.load(peers.saved(BASES[base]))
    pipe = pipe.replace(progress=False, scheduler=flaxdiff.DDIMScheduler.from_config(pipe.scheduler))
    for i, state in enumerate(states):
        path = write(state, folder / f"adapter{i}.{format}")
        pipe, params = flaxdiff.load_ip_adapter(pipe, params, path, **options)
    n = len(states)
    peer.load_ip_adapter(states, [""] * n, [""] * n, image_encoder_folder=None, low_cpu_mem_usage=False)
    return pipe, params, peer


def compare(pipe, params, peer, options, scale=1.0, ours=(), theirs=(), text=TEXT):
    noise = normal(2, 8, 8, 4)
    peer.set_ip_adapter_scale(scale)
    with torch.no_grad():
        there = peer(**text, **options, **dict(theirs), latents=peers.nchw(noise), output_type="np").images
    here = pipe(params, KEY, **text, **options, **dict(ours), ip_adapter_scale=scale, latents=noise, output_type="np")
    return peers.relative(here.images, there)


@pytest.mark.parametrize(
    ("base", "kind", "format"),
    [
        ("1", "base", "bin"),
        ("1", "plus", "safetensors"),
        ("1", "full", "bin"),
        ("XL", "base", "safetensors"),
        pytest.param("XL", "plus", "bin", marks=pytest.mark.slow),
    ],
)
def test_pictures(base, kind, format, tmp_path):
    """Each form of projection that reads pictures; a scale for all, and by layer."""
    pipe, params, peer = pair(base, tmp_path, kind, format=format)
    options = dict(ip_adapter_image=picture())
    assert compare(pipe, params, peer, options, 0.7) < 1e-3
    by_layer = {"down": 0.3, "up": {"block_1": [0.9, 0.2]}} if base == "1" else {"up": {"block_0": [0.5, 1.5]}}
    assert compare(pipe, params, peer, options, by_layer) < 1e-3
    absent = pipe(params, KEY, **TEXT, **options, ip_adapter_scale=0.0, output_type="np").images
    assert np.abs(absent - pipe(params, KEY, **TEXT, **options, output_type="np").images).max() > 1e-3


@pytest.mark.parametrize("shortcut", [False, True])
def test_faces(shortcut, tmp_path):
    """FaceID reads embeddings, FaceID Plus patches as well; its second version adds a shortcut."""
    kind = "faceid_plus" if shortcut else "faceid"
    pipe, params, peer = pair("1", tmp_path, kind, shortcut=shortcut)
    embeds, patches = normal(2, 1, 12), normal(2, 1, 5, 16)
    ours = dict(ip_adapter_image_embeds=[embeds])
    if shortcut:
        ours["ip_adapter_clip_embeds"] = [patches]
        layer = peer.unet.encoder_hid_proj.image_projection_layers[0]
        layer.clip_embeds, layer.shortcut = torch.tensor(patches), True
    text = TEXT | dict(prompt="a red dog", negative_prompt="ugly")
    noise = normal(1, 8, 8, 4)
    with torch.no_grad():
        there = peer(
            **text, ip_adapter_image_embeds=[torch.tensor(embeds)], latents=peers.nchw(noise), output_type="np"
        ).images
    here = pipe(params, KEY, **text, **ours, latents=noise, output_type="np").images
    assert peers.relative(here, there) < 1e-3


def test_the_lora_of_a_face(tmp_path):
    """FaceID's file updates the U-Net as well: against the updates merged in PyTorch."""
    peer = peers.stable_diffusion_1()
    state, draw = peers.ip_adapter("faceid", peer.unet), torch.Generator().manual_seed(3)
    for i, name in enumerate(peer.unet.attn_processors):
        module = peer.unet.get_submodule(name.removesuffix(".processor"))
        for part, layer in dict(q=module.to_q, k=module.to_k, v=module.to_v, out=module.to_out[0]).items():
            down, up = (torch.randn(s, generator=draw) * 0.1 for s in ((2, layer.in_features), (layer.out_features, 2)))
            state["ip_adapter"] |= {f"{i}.to_{part}_lora.down.weight": down, f"{i}.to_{part}_lora.up.weight": up}
            with torch.no_grad():
                layer.weight += up @ down
    pipe, params = flaxdiff.load(peers.saved(peers.stable_diffusion_1))
    _, params = flaxdiff.load_ip_adapter(pipe, params, write(state, tmp_path / "face.bin"))
    x, t, text = normal(1, 8, 8, 4), np.float32([7]), normal(1, 5, 16)
    with torch.no_grad():
        theirs = peer.unet(peers.nchw(x), torch.tensor(t), torch.tensor(text)).sample
    assert peers.relative(flaxdiff.apply(pipe.unet, params["unet"], x, t, text), peers.nhwc(theirs)) < 1e-4


def test_several_with_masks(tmp_path):
    """A style and two masked pictures at once."""
    pipe, params, peer = pair("1", tmp_path, "base", "plus")
    first, second, third = picture(), picture(), picture()
    options = dict(ip_adapter_image=[first, [second, third]])
    assert compare(pipe, params, peer, options, [0.7, 0.4]) < 1e-3
    left = np.zeros((16, 16), np.float32)
    left[:, :9] = 1
    masks = [[np.ones((16, 16), np.float32)], [left, 1 - left]]
    there = dict(cross_attention_kwargs={"ip_adapter_masks": [torch.tensor(np.stack(m))[None] for m in masks]})
    here = dict(ip_adapter_masks=masks)
    assert compare(pipe, params, peer, options, [0.7, [0.9, 0.4]], here, there) < 1e-3


def test_nothing_recompiles(tmp_path):
    """Pictures, scales, by layer or not, and masks are values."""
    pipe, params, _ = pair("1", tmp_path, "base")
    run = lambda **options: pipe(params, KEY, **TEXT, **options, output_type="np").images
    one, mask = picture(), np.ones((16, 16), np.float32)
    first, before = run(ip_adapter_image=one), peers.programs()
    for change in (
        dict(ip_adapter_image=picture()),
        *(dict(ip_adapter_image=one, ip_adapter_scale=s) for s in (0.3, {"up": 1.0})),
    ):
        assert np.abs(run(**change) - first).max() > 1e-4
    assert peers.programs() == before
    masked = dict(ip_adapter_image=one, ip_adapter_masks=[[mask]])
    np.testing.assert_allclose(run(**masked), first, atol=1e-5)
    before = peers.programs()
    half = mask * (np.arange(16) < 8)
    assert np.abs(run(ip_adapter_image=one, ip_adapter_masks=[[half]]) - first).max() > 1e-4
    assert peers.programs() == before


def test_saved_without(tmp_path):
    """diffusers' layout has no place for an adapter; the rest is saved as it was."""
    pipe, params = flaxdiff.load(peers.saved(peers.stable_diffusion_1))
    path = write(peers.ip_adapter("base", peers.stable_diffusion_1().unet), tmp_path / "base.bin")
    more, added = flaxdiff.load_ip_adapter(pipe, params, path, image_encoder_folder=None)
    assert set(added) == {*params, "ip_adapter"} and all(added[name] is params[name] for name in params)
    flaxdiff.save(tmp_path / "saved", more, added)
    assert flaxdiff.load(tmp_path / "saved")[0].specs == pipe.specs


def test_bad_input(tmp_path):
    peer = peers.stable_diffusion_1()
    pipe, params = flaxdiff.load(peers.saved(peers.stable_diffusion_1))
    with pytest.raises(ValueError, match="has no IP-Adapter; put one on"):
        pipe.prepare_inputs(prompt="cat", ip_adapter_image=picture())
    path = write(peers.ip_adapter("base", peer.unet), tmp_path / "base.bin")
    with pytest.raises(FileNotFoundError):
        flaxdiff.load_ip_adapter(pipe, params, path)
    other = write(peers.ip_adapter("base", peers.stable_diffusion_xl().unet), tmp_path / "xl.bin")
    with pytest.raises(ValueError, match="attends to 32 channels.*attends to 16: it was made for another base model"):
        flaxdiff.load_ip_adapter(pipe, params, other)
    with pytest.raises(ValueError, match="is no IP-Adapter: it lacks"):
        flaxdiff.load_ip_adapter(
            pipe, params, write({"image_proj": {"x": torch.ones(2)}}, tmp_path / "none.safetensors")
        )
    pipe, params = flaxdiff.load_ip_adapter(pipe, params, path, image_encoder_folder=None)
    for options, message in (
        (dict(), "give either ip_adapter_image= or ip_adapter_image_embeds="),
        (dict(ip_adapter_image=picture()), "no image encoder to read ip_adapter_image; give ip_adapter_image_embeds="),
        (dict(ip_adapter_image_embeds=[normal(2, 1, 20)] * 2), "2 entries for 1 IP-Adapters"),
        (
            dict(ip_adapter_image_embeds=[normal(2, 1, 20)], ip_adapter_scale={"up": {"block_0": 1.0}}),
            "no transformers in up",
        ),
        (
            dict(ip_adapter_image_embeds=[normal(2, 1, 20)], ip_adapter_masks=[[np.ones((16, 16))] * 2]),
            "2 masks for 1 pictures",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.prepare_inputs(prompt="cat", **options)


def flux_adapter(net, seed):
    """An IP-Adapter of XLabs for a transformer and the tiny image encoder."""
    draw, read = torch.Generator().manual_seed(seed), net.config.joint_attention_dim
    tensor = lambda *shape: torch.randn(shape, generator=draw) / shape[-1] ** 0.5
    proj = {"proj.weight": tensor(4 * read, 20), "proj.bias": tensor(4 * read)}
    proj |= {"norm.weight": 1 + tensor(read), "norm.bias": tensor(read)}
    pairs = {}
    for i in range(net.config.num_layers):
        for part in ("to_k_ip", "to_v_ip"):
            pairs |= {f"{i}.{part}.weight": tensor(net.inner_dim, read), f"{i}.{part}.bias": tensor(net.inner_dim)}
    return {"image_proj": proj, "ip_adapter": pairs}


@pytest.mark.parametrize("count, avoided", [(1, None), (2, None), (1, "picture"), (1, "embeds")])
def test_flux(count, avoided, tmp_path):
    """By blocks, or two at once; what is to be avoided sees a black picture, or another. In XLabs' names."""
    pipe, params, _ = flux.load("FluxPipeline")
    parts = flux.parts()
    parts["transformer"] = copy.deepcopy(parts["transformer"])
    processor = transformers.CLIPImageProcessorPil(size=32, crop_size=32)
    peer = diffusers.FluxPipeline(**parts, image_encoder=peers.image_encoder(), feature_extractor=processor)
    peer.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    halves = dict(vision_config=peer.image_encoder.config.to_dict(), text_config=sizes | dict(vocab_size=99))
    clip = transformers.CLIPModel(transformers.CLIPConfig(**halves, projection_dim=20))  # whole, as it is published
    missing, _ = clip.load_state_dict(peer.image_encoder.state_dict(), strict=False)
    assert not any(name.startswith("vi") for name in missing)
    clip.save_pretrained(tmp_path / "clip")
    seen = dict(image_encoder_pretrained_model_name_or_path=tmp_path / "clip")
    states = [flux_adapter(peer.transformer, seed) for seed in range(count)]
    for i, state in enumerate(states):
        theirs = {f"ip_adapter_proj_model.{k}": t for k, t in state["image_proj"].items()}
        for key, tensor in state["ip_adapter"].items():
            block, part, kind = key.split(".")
            name = f"ip_adapter_double_stream_{part[3]}_proj.{kind}"
            theirs[f"double_blocks.{block}.processor.{name}"] = tensor
        save_file(theirs, tmp_path / f"adapter{i}.safetensors")
        pipe, params = flaxdiff.load_ip_adapter(pipe, params, tmp_path / f"adapter{i}.safetensors", **seen)
    options = dict(image_encoder_pretrained_model_name_or_path=None, low_cpu_mem_usage=False)
    peer.load_ip_adapter(states, [""] * count, **options)
    scale = [0.4, 0.9] if count == 1 else [0.7, 0.5]
    peer.set_ip_adapter_scale(scale)
    images = [picture() for _ in range(count)]
    given = flux.SMALL | flux.TRUE | dict(ip_adapter_image=images if count > 1 else images[0], output_type="np")
    embeds = normal(2, 1, 1, 20)
    more = {
        None: {},
        "picture": dict(negative_ip_adapter_image=picture()),
        "embeds": dict(ip_adapter_image_embeds=[embeds[0]], negative_ip_adapter_image_embeds=[embeds[1]]),
    }[avoided]
    if avoided == "embeds":
        given.pop("ip_adapter_image")
    as_there = {k: [*map(torch.tensor, v)] if "embeds" in k else v for k, v in more.items()}
    with torch.no_grad():
        there = peer(**given, **as_there, latents=flux.packed(flux.NOISE)).images
    given |= more
    call = lambda scale: pipe(params, KEY, **given, ip_adapter_scale=scale, latents=flux.NOISE).images
    assert peers.relative(call(scale), there, of="FluxPipeline") < 1e-3
    assert np.abs(call([0.0, 0.0]) - there).max() > 5e-3
    if avoided == "picture":
        several = given | dict(ip_adapter_image=[[picture(), picture()]], negative_ip_adapter_image=None)
        assert pipe(params, KEY, **several, latents=flux.NOISE).images.shape == there.shape
        with pytest.raises(ValueError, match="ip_adapter sees 2 pictures, and 1 to be avoided; give as many"):
            pipe.prepare_inputs(**{k: v for k, v in (several | more).items() if k != "output_type"})


def sd3_adapter(net):
    """An IP-Adapter for Stable Diffusion 3 and the tiny SigLIP, as diffusers has it, and in the names of the files."""
    torch.manual_seed(5)
    width, head = net.inner_dim, net.config.attention_head_dim
    proj = IPAdapterTimeImageProjection(embed_dim=16, output_dim=width, hidden_dim=32, heads=2, num_queries=3)
    blocks = [SD3IPAdapterJointAttnProcessor2_0(width, width, head, 32) for _ in range(net.config.num_layers)]
    for module in (proj, *blocks):
        for p in module.parameters():
            p.data = torch.randn(p.shape) / p.shape[-1] ** 0.5 if p.ndim > 1 else 1 + 0.1 * torch.randn(p.shape)
    old = {"ln0": "0.norm1", "ln1": "0.norm2", "attn.to_out.0": "0.to_out", "attn.": "0.", "adaln_norm": "1.0"}
    old |= {"ff.net.0.proj": "1.1", "ff.net.2": "1.3", "adaln_proj": "2.1"}
    image_proj = {}
    for key, tensor in proj.state_dict().items():
        new = next((new for new in old if f".{new}" in key and key.startswith("layers")), None)
        image_proj[key.replace(new, old[new]) if new else key] = tensor
    attend = {f"{i}.{k}": t for i, block in enumerate(blocks) for k, t in block.state_dict().items()}
    return {"image_proj": image_proj, "ip_adapter": attend}


@pytest.mark.parametrize("seen", ["picture", "embeds"])
def test_stable_diffusion_3(seen, tmp_path):
    parts = sd3.parts() | {"transformer": copy.deepcopy(sd3.transformer(qk_norm="rms_norm"))}
    processor = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    encoder = flux.siglip()
    encoder.save_pretrained(tmp_path / "image_encoder")
    peer = diffusers.StableDiffusion3Pipeline(**parts)
    peer.save_pretrained(tmp_path / "pipe")
    peer = diffusers.StableDiffusion3Pipeline(**parts, image_encoder=encoder, feature_extractor=processor)
    peer.set_progress_bar_config(disable=True)
    state = sd3_adapter(peer.transformer)
    write(state, tmp_path / "adapter.safetensors")
    pipe, params = flaxdiff.StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipe")
    pipe, params = flaxdiff.load_ip_adapter(pipe.replace(progress=False), params, tmp_path / "adapter.safetensors")
    peer.load_ip_adapter(copy.deepcopy(state), low_cpu_mem_usage=False)
    peer.set_ip_adapter_scale(0.7)
    given = sd3.SMALL | dict(negative_prompt="ugly", output_type="np")
    embeds = normal(2, 4, 16)
    ours = dict(ip_adapter_image=picture()) if seen == "picture" else dict(ip_adapter_image_embeds=embeds)
    theirs = ours if seen == "picture" else dict(ip_adapter_image_embeds=torch.tensor(embeds))
    with torch.no_grad():
        there = peer(**given, **theirs, latents=peers.nchw(sd3.NOISE)).images
    call = lambda scale: pipe(params, KEY, **given, **ours, ip_adapter_scale=scale, latents=sd3.NOISE).images
    assert peers.relative(call(0.7), there, of="StableDiffusion3Pipeline") < 1e-3
    assert np.abs(call(0.0) - there).max() > 1e-2
    with pytest.raises(ValueError, match="has 4 blocks that see pictures; 2 scales were given"):
        call([1.0, 0.5])
    if seen == "picture":
        other = sd3.load("StableDiffusion3Pipeline", newer=True)
        with pytest.raises(ValueError, match="has a second attention in some blocks"):
            flaxdiff.load_ip_adapter(*other[:2], tmp_path / "adapter.safetensors")
