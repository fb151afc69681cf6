"""A rule of one's own that reads attention maps: change a word, and nothing where the network does not look for it.

`python docs/prompt_to_prompt.py` draws docs/prompt_to_prompt.png with the shipped model: above, prompts that differ in
a word, from the same noise; below, all of them held to the first wherever neither word is attended to.

Reference: Hertz et al., Prompt-to-Prompt Image Editing with Cross Attention Control, 2022; this is its local blend.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import flaxdiff
from flaxdiff.guidance import At, Guidance, attentive, cfg, chain

PAIRS = (  # prompts that differ in their first word
    ("dog face on blue", "cat face on blue", "fox face on blue"),
    ("apple on pink", "pear on pink", "lemon on pink"),
)


def prompt_to_prompt(changed: Sequence[int]) -> Callable[..., Guidance]:
    """The rule for a batch of which the first image is to be kept where tokens at these places are not attended to."""

    def looked(at: At, sides: tuple[int, int]) -> jax.Array:
        """[B, H, W, 1]: how much each image looks for its word at each place of a sample, 1 where most."""
        pairs = [to_text for _, to_text in at.seen["positive"].values()]
        heat = attentive.at_a_quarter(pairs, sides)[..., list(changed)].sum(-1)  # of the maps [B, N, tokens]
        heat = attentive.smoothed(heat.reshape(len(heat), *attentive.grid(heat.shape[1], sides), 1))
        return attentive.enlarged(heat / heat.max((1, 2), keepdims=True), sides)

    def rule(guidance_scale, threshold=0.4):
        def combine(most, guess, predictions, at):
            most = jnp.maximum(most, looked(at, guess.shape[1:3]))  # so far
            return jnp.where(jnp.maximum(most, most[:1]) > threshold, guess, guess[:1]), most

        held = Guidance(combine, lambda sample: jnp.zeros_like(sample[..., :1]), watches=lambda names: names)
        return chain(cfg(guidance_scale), held)

    return rule


def draw() -> Image.Image:
    """The picture."""
    pipe, params = flaxdiff.load()
    held = pipe.replace(guidance=prompt_to_prompt([1]))
    noise = jax.random.normal(jax.random.key(3), (1, 16, 16, pipe.vae.config.latent_channels))
    page = []
    for prompts in PAIRS:
        options = dict(prompt=list(prompts), latents=np.repeat(noise, len(prompts), 0))
        for way in (pipe, held):
            page += way(params, jax.random.key(0), **options).images
    return flaxdiff.make_image_grid(page, 2 * len(PAIRS), 3, resize=96)


if __name__ == "__main__":
    draw().save(Path(__file__).with_suffix(".png"))
