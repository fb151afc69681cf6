"""Draw the pictures of these pages with the shipped model: `python docs/pictures.py` writes them anew."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import flaxdiff

HERE = Path(__file__).parent

PROMPTS = """dog face, red apple, slice of pizza, owl, heavy black heart, rocket, grinning face, cactus,
dog face on blue, cat face on pink, slice of pizza on green, an owl on a purple background, rocket on black,
cactus on orange, a picture of a snowman on brown, ghost on gray, maple leaf, hot beverage, octopus, sailboat,
guitar, pineapple, clown face on yellow, unicorn face on red"""

SAMPLERS = """DDIM, DDPM, PLMS, Euler, Euler a, LMS, Heun, DPM2, DPM2 a, DPM++ 2S a, DPM++ 2M, DPM++ 2M SDE,
DPM++ 3M SDE, DEIS, UniPC, DPM fast"""
STEPS = (4, 8, 16, 32)


def emoji() -> Image.Image:
    """The grid of the README: three rows of eight."""
    pipe, params = flaxdiff.load()
    prompts = " ".join(PROMPTS.split()).split(", ")
    images = pipe(params, jax.random.key(1), prompt=prompts).images
    return flaxdiff.make_image_grid(images, 3, 8, resize=128)


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


if __name__ == "__main__":
    for picture in (emoji, schedulers):
        picture().save(HERE / f"{picture.__name__}.png")
