"""Draw the contact sheets of docs/guidance.md with the shipped model: `python docs/guidance.py [name …]`.

One sheet for each technique: a row for each prompt, a column for each value of its strength. Strengths are values, so a
sheet compiles one program.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from pictures import given
from PIL import Image, ImageDraw, ImageFont

import flaxdiff
from flaxdiff import caching, guidance
from flaxdiff.guidance import Layers, cfg, chain

HERE = Path(__file__).parent / "guidance"
PROMPTS = ("dog face on blue", "slice of pizza", "owl on a pink background", "rocket")
ALL = Layers(["mid", "up_blocks.0", "down_blocks.2"])


def apg(guidance_scale, eta=1.0):
    return guidance.apg(guidance_scale, eta, threshold=5.0)


def zero_star(guidance_scale):
    return guidance.zero_star(guidance_scale, 0)


def tangential(guidance_scale):
    return guidance.tangential(guidance_scale)


def frequency(guidance_scale, high_scale=1.0):
    return guidance.frequency_decoupled(guidance_scale, high_scale)


def interval(guidance_scale, start=0.0, stop=1.0):
    return guidance.interval(start, stop, cfg(guidance_scale))


def seg(guidance_scale, seg_scale=0.0, layers=ALL):
    return chain(cfg(guidance_scale), guidance.seg(seg_scale, layers))


def slg(guidance_scale, slg_scale=0.0, layers=Layers(["mid"])):
    return chain(cfg(guidance_scale), guidance.slg(slg_scale, layers))


def auto(guidance_scale, autoguidance_scale=1.0):
    return chain(cfg(guidance_scale), guidance.autoguidance(autoguidance_scale))


def worn(weights, share: float = 0.1):
    """Weights under noise, as large as this share of each array's deviation: a network that has learned less."""
    key = jax.random.key(0)
    noise = lambda i, a: share * a.std() * jax.random.normal(jax.random.fold_in(key, i), a.shape)
    return {name: a + noise(i, a) for i, (name, a) in enumerate(weights.items())}


def alike(guidance_scale, amount=0.0):
    return chain(cfg(guidance_scale), guidance.pix2pix_zero(amount))


def refer(guidance_scale, reference_scale=0.0, layers=Layers(["block"])):
    return chain(cfg(guidance_scale), guidance.reference(reference_scale, layers))


def red(guidance_scale, red_scale=0.0):
    loss = lambda pictures: -(pictures[..., 0] - pictures[..., 1:].mean(-1)).mean((1, 2))
    late = guidance.interval(
        0.3, 1.0, guidance.by_loss(loss, red_scale, of_pictures=True)
    )  # there is nothing yet before
    return chain(cfg(guidance_scale), late)


SEMANTIC = dict(editing_prompt="on green", edit_warmup_steps=1, edit_threshold=0.5)
SAFE = dict(safety_concept="on pink", sld_warmup_steps=1, sld_threshold=1.0, sld_momentum_scale=0.0)
EXCITE = dict(token_indices=[[1]] * len(PROMPTS), thresholds={})
SWAPS = ["dog face on blue", "cat face on blue", "fox face on blue", "apple on blue"]
SWAP = dict(prompt=SWAPS, latents=np.repeat(jax.random.normal(jax.random.key(3), (1, 16, 16, 8)), len(SWAPS), 0))
SHOWN = Image.new("RGB", (64, 64), "black"), Image.new("RGB", (64, 64), "white")  # the first image is given, no other
REFER = dict(prompt=["strawberry", "pear", "", ""], mask_image=[SHOWN[0], *SHOWN[1:] * 3])
# what -> (class or None for the plain one, fields to replace, what stays, what is swept, its values)
SHEETS = {
    "cfg": (None, {}, {}, "guidance_scale", (1.0, 1.5, 3.0, 6.0, 12.0)),
    "rescale": (None, {}, dict(guidance_scale=8.0), "guidance_rescale", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "apg": (None, dict(guidance=apg), dict(guidance_scale=8.0), "eta", (1.0, 0.75, 0.5, 0.25, 0.1)),
    "zero_star": (None, dict(guidance=zero_star), {}, "guidance_scale", (1.01, 1.5, 3.0, 6.0, 12.0)),
    "tangential": (None, dict(guidance=tangential), {}, "guidance_scale", (1.01, 1.5, 3.0, 6.0, 12.0)),
    "frequency": (None, dict(guidance=frequency), dict(guidance_scale=1.5), "high_scale", (1.0, 2.0, 4.0, 8.0, 16.0)),
    "interval": (None, dict(guidance=interval), dict(guidance_scale=6.0), "start", (0.0, 0.2, 0.4, 0.6, 0.8)),
    "pag": ("StableDiffusionPAGPipeline", {}, {}, "pag_scale", (0.0, 2.0, 4.0, 8.0, 16.0)),
    "seg": (None, dict(guidance=seg), {}, "seg_scale", (0.0, 2.0, 4.0, 8.0, 16.0)),
    "slg": (None, dict(guidance=slg), {}, "slg_scale", (0.0, 2.0, 4.0, 8.0, 16.0)),
    "autoguidance": (None, dict(guidance=auto), {}, "autoguidance_scale", (1.0, 1.5, 2.0, 3.0, 5.0)),
    "sag": ("StableDiffusionSAGPipeline", {}, {}, "sag_scale", (0.0, 0.5, 1.0, 2.0, 4.0)),
    "semantic": ("SemanticStableDiffusionPipeline", {}, SEMANTIC, "edit_guidance_scale", (0.0, 0.05, 0.1, 0.2, 0.4)),
    "safe": ("StableDiffusionPipelineSafe", {}, SAFE, "sld_guidance_scale", (0.0, 0.1, 1.0, 10.0, 1000.0)),
    "excite": ("StableDiffusionAttendAndExcitePipeline", {}, EXCITE, "scale_factor", (0.0, 50.0, 100.0, 200.0, 400.0)),
    "pix2pix_zero": (None, dict(guidance=alike), SWAP, "amount", (0.0, 10.0, 30.0, 100.0, 300.0)),
    "reference": (
        "StableDiffusionInpaintPipeline",
        dict(guidance=refer),
        REFER,
        "reference_scale",
        (0, 0.3, 1, 10, 100),
    ),
    "loss": (None, dict(guidance=red), {}, "red_scale", (0.0, 100.0, 300.0, 1000.0, 3000.0)),
    "freeu": (
        None,
        {},
        {},
        "freeu",
        ((1, 1, 1, 1), (0.9, 0.9, 1.1, 1.1), (0.9, 0.7, 1.1, 1.2), (0.7, 0.5, 1.2, 1.4), (0.9, 0.2, 1.5, 1.6)),
    ),
    "deep_cache": (None, dict(cache=caching.deep_cache), {}, "cache_interval", (1, 2, 3, 5, 10)),
    "branch_cache": (None, dict(cache=caching.branch_cache), {}, "cache_interval", (1, 2, 3, 5, 10)),
    "tgate": (None, dict(cache=caching.tgate), {}, "gate_step", (24, 16, 10, 6, 3)),
    "token_merging": (None, {}, {}, "token_merging", (0.0, 0.1, 0.25, 0.5, 0.75)),
}


def sheet(name: str, side: int = 80, head: int = 18) -> Image.Image:
    """One technique, its strength swept."""
    cls, fields, fixed, swept, values = SHEETS[name]
    pipe, params = getattr(flaxdiff, cls or "StableDiffusionPipeline").from_pretrained(flaxdiff.EMOJI)
    if name == "autoguidance":
        pipe, params = type(pipe).from_pipe(pipe, unet_weaker=pipe.unet), params | {"unet_weaker": worn(params["unet"])}
    pipe = pipe.replace(**fields, progress=False)
    page = Image.new("RGB", (len(values) * (side + 4), head + len(PROMPTS) * (side + 4)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for column, value in enumerate(values):
        if swept == "token_merging":
            pipe, asked = pipe.replace(unet=pipe.unet.replace(token_merging=value)), {}
        else:
            asked = {swept: value}
        if name == "reference":
            asked |= dict(image=[given("strawberry")] * len(PROMPTS), strength=1.0)
        options = dict(prompt=list(PROMPTS), num_inference_steps=24) | fixed | asked
        for row, image in enumerate(pipe(params, jax.random.key(1), **options).images):
            page.paste(image.resize((side, side)), (column * (side + 4), head + row * (side + 4)))
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        pen.text((column * (side + 4) + side // 2, head // 2), shown, "black", font, anchor="mm")
    return page


if __name__ == "__main__":
    for name in sys.argv[1:] or SHEETS:
        small = sheet(name).quantize(200, Image.Quantize.MEDIANCUT)
        small.save(HERE / f"{name}.png", optimize=True)
        print(name, flush=True)
