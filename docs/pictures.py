"""Draw the pictures of these pages with the shipped model: `python docs/pictures.py` writes them anew.

With `--adapters runs/emoji` also those of the ControlNet and the LoRA that train/train_controlnet.py and
train/train_lora.py leave there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import flaxdiff
from flaxdiff.training import emoji as data

HERE = Path(__file__).parent

PROMPTS = """dog face, red apple, slice of pizza, owl, heavy black heart, rocket, grinning face, cactus,
dog face on blue, cat face on pink, slice of pizza on green, an owl on a purple background, rocket on black,
cactus on orange, a picture of a snowman on brown, ghost on gray, maple leaf, hot beverage, octopus, sailboat,
guitar, pineapple, clown face on yellow, unicorn face on red"""

SAMPLERS = """DDIM, DDPM, PLMS, Euler, Euler a, LMS, Heun, DPM2, DPM2 a, DPM++ 2S a, DPM++ 2M, DPM++ 2M SDE,
DPM++ 3M SDE, DEIS, UniPC, DPM fast"""
STEPS = (4, 8, 16, 32)


def emoji(model: str = "emoji") -> Image.Image:
    """The grid of the README: three rows of eight."""
    pipe, params = flaxdiff.load(model)
    prompts = " ".join(PROMPTS.split()).split(", ")
    images = pipe(params, jax.random.key(1), prompt=prompts).images
    return flaxdiff.make_image_grid(images, 3, 8, resize=128)


def emoji_flow() -> Image.Image:
    """The same by the second model."""
    return emoji("emoji-flow")


def schedulers(prompt: str = "dog face on blue") -> Image.Image:
    """One noise sampled by sixteen schedulers at four step counts: sixty-four plans, stacked, in one call."""
    pipe, params = flaxdiff.load()
    names = " ".join(SAMPLERS.split()).split(", ")
    samplers = [flaxdiff.scheduler(name, pipe.scheduler) for name in names]
    inputs = pipe.prepare_inputs(prompt)
    plans = [s.plan(n, pad_to=64) for s in samplers for n in STEPS]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *plans)
    draw = lambda plan: pipe.generate(params, jax.random.key(0), {**inputs, "plan": plan})[0]
    images = np.asarray(jax.jit(jax.vmap(draw))(stack))  # [64, H, W, 3]

    side, margin, head = images.shape[1], 110, 20
    page = Image.new("RGB", (margin + len(STEPS) * (side + 4), head + len(names) * (side + 4)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for k, image in enumerate(flaxdiff.images.to_pil(images)):
        row, column = divmod(k, len(STEPS))
        page.paste(image, (margin + column * (side + 4), head + row * (side + 4)))
    for row, name in enumerate(names):
        pen.text((4, head + row * (side + 4) + side // 2), name, "black", font, anchor="lm")
    for column, n in enumerate(STEPS):
        pen.text((margin + column * (side + 4) + side // 2, head // 2), f"{n} steps", "black", font, anchor="mm")
    return page


def given(name: str) -> Image.Image:
    """One of the emoji that the model learned from."""
    names, rgba = data.load()
    return flaxdiff.images.to_pil(data.over(rgba[[names.index(name)]], np.full((1, 3), 255)) / 2 + 0.5)[0]


def sheet(rows: Sequence[Sequence[Image.Image]], side: int = 96) -> Image.Image:
    return flaxdiff.make_image_grid([image for row in rows for image in row], len(rows), len(rows[0]), resize=side)


def seeds(prompts: Sequence[str] = ("bird", "fish on blue")) -> Image.Image:
    """Sixteen keys for each prompt."""
    pipe, params = flaxdiff.load()
    draw = lambda prompt: pipe(params, list(jax.random.split(jax.random.key(0), 16)), prompt=[prompt] * 16).images
    return sheet([images[i : i + 8] for images in map(draw, prompts) for i in (0, 8)])


def image_to_image() -> Image.Image:
    """A picture, and what a prompt makes of it, the more the stronger."""
    pipe, params = flaxdiff.AutoPipelineForImage2Image.from_pretrained(flaxdiff.EMOJI)
    asked = {"dog face": "cat face on pink", "pear": "green apple", "penguin": "owl", "red apple": "tomato on blue"}
    draw = lambda prompt, image, strength: pipe(
        params, jax.random.key(0), prompt=prompt, image=image, strength=strength, num_inference_steps=40
    ).images[0]
    strengths = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
    return sheet([[given(n), *(draw(prompt, given(n), s) for s in strengths)] for n, prompt in asked.items()])


INPAINT = (  # what is given, what is asked for, and the corners of where
    ("grinning face", "smiling face with sunglasses", (0, 0, 64, 36)),
    ("grinning face", "face with stuck-out tongue", (0, 34, 64, 64)),
    ("horse face", "unicorn face", (0, 0, 64, 20)),
    ("red apple", "green apple", (32, 0, 64, 64)),
    ("cat face", "smiling cat face with heart-shaped eyes", (0, 0, 64, 38)),
    ("full moon symbol", "grinning face", (12, 12, 52, 52)),
)


def inpainting() -> Image.Image:
    """Pictures, masks, and what was painted over what is white in them; the model was not made for it."""
    pipe, params = flaxdiff.AutoPipelineForInpainting.from_pretrained(flaxdiff.EMOJI)
    columns = []
    for name, prompt, box in INPAINT:
        image, mask = given(name), Image.new("L", (64, 64))
        mask.paste(255, box)
        options = dict(prompt=prompt, image=image, mask_image=mask, num_inference_steps=24)
        columns.append((image, mask.convert("RGB"), pipe(params, jax.random.key(0), **options).images[0]))
    return sheet(list(zip(*columns)))


EDITS = (
    ("red apple", "green apple"),
    ("dog face", "cat face"),
    ("smiling face", "face with sunglasses on green"),
    ("unicorn face", "horse face"),
    ("tomato", "owl"),
)


def editing() -> Image.Image:
    """Pictures, where DiffEdit finds that two prompts disagree, what it paints, and LEDITS++ with scales of 0 to 3."""
    pipe, params = flaxdiff.load()
    diffedit = flaxdiff.StableDiffusionDiffEditPipeline.from_pipe(pipe)
    ledits = flaxdiff.LEditsPPPipelineStableDiffusion.from_pipe(pipe)
    page, key = [], jax.random.key(0)
    for n, (source, target) in enumerate(EDITS):
        image = pipe(params, jax.random.key(n), prompt=source, num_inference_steps=25).images[0]
        prompts = dict(source_prompt=source, target_prompt=target, guidance_scale=3.0, mask_encode_strength=0.6)
        mask = diffedit.generate_mask(params, key, image=image, **prompts)
        options = dict(num_inference_steps=30, inpaint_strength=0.9)
        path = diffedit.invert(params, key, image=image, prompt=source, guidance_scale=1.0, **options)
        options |= dict(mask_image=mask, image_latents=path, guidance_scale=1.8)
        painted = diffedit(params, key, prompt=target, **options).images[0]
        found = ledits.invert(params, key, image=image, prompt=source, num_inversion_steps=40, skip=0.25).inversion
        options = dict(prompt=source, inversion=found, editing_prompt=target, edit_threshold=0.6)
        edited = [ledits(params, key, edit_guidance_scale=scale, **options).images[0] for scale in range(4)]
        where = Image.fromarray(np.uint8(255 * mask[0])).resize(image.size, Image.Resampling.NEAREST)
        page += [image, where, painted, *edited]
    return flaxdiff.make_image_grid(page, len(EDITS), 7, resize=96)


def controlnet(folder: Path) -> Image.Image:
    """Edges, and emoji along them: without a prompt, with the one that they are of, and with others."""
    net = flaxdiff.ControlNetModel.from_pretrained(folder / "controlnet")
    pipe, params = flaxdiff.AutoPipelineForText2Image.from_pretrained(flaxdiff.EMOJI, controlnet=net)
    rows = []
    for name, prompts in LED.items():
        lines = data.edges(np.asarray(given(name), np.float32)[None] / 127.5 - 1)
        draw = lambda prompt, lines=lines: pipe(params, jax.random.key(0), prompt=prompt, image=lines).images[0]
        rows.append([flaxdiff.images.to_pil(lines)[0], *map(draw, ("", name, *prompts))])
    return sheet(rows)


LED = {
    "dog face": ("bear face", "cat face", "dog face on blue"),
    "owl": ("penguin", "bird on pink", "owl on black"),
    "red apple": ("tomato", "green apple", "soccer ball"),
    "rocket": ("pencil", "carrot", "rocket on purple"),
}


def style(folder: Path) -> Image.Image:
    """A LoRA of a style, put on more and more."""
    pipe, params = flaxdiff.load()
    adapter = flaxdiff.read_lora(pipe, folder / "lora")
    prompts = ["dog face", "slice of pizza", "owl", "rocket", "red apple", "cactus", "octopus", "guitar"]
    on = lambda scale: flaxdiff.set_adapters(params, [adapter], scale)
    return sheet([pipe(on(scale), jax.random.key(1), prompt=prompts).images for scale in (0.0, 0.5, 1.0)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=Path, help="the folder with controlnet and lora")
    folder = parser.parse_args().adapters
    for picture in (emoji, emoji_flow, schedulers, seeds, image_to_image, inpainting, editing):
        picture().save(HERE / f"{picture.__name__}.png")
    for picture in (controlnet, style) if folder else ():
        picture(folder).save(HERE / f"{picture.__name__}.png")
