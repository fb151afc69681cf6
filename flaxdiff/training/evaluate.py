"""Measure the text-to-emoji model: `python -m flaxdiff.training.evaluate` recomputes every figure of its card.

Reconstruction: the autoencoder's PSNR. Names: one picture of each, by R@1 (whether, of all the emoji on white, the
nearest at 16 x 16 pixels is the one asked for) and by PSNR to the reference at 64 x 64. Pairs never trained on:
whether the corners have the colour asked for, and whether the nearest of all the emoji on that colour is the one
asked for.
"""

import argparse
import json
from collections.abc import Callable, Sequence

import jax
import numpy as np

import flaxdiff
from flaxdiff.core import apply
from flaxdiff.training import emoji

Draw = Callable[[Sequence[str]], np.ndarray]  # captions -> pictures in [-1, 1]


def psnr(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """10 log10(peak² / MSE) of each picture [B, H, W, C] in [-1, 1], in dB.

    >>> psnr(np.zeros((1, 2, 2, 3)), np.full((1, 2, 2, 3), 0.2))
    array([20.])
    """
    return 10 * np.log10(4 / np.square(image - reference, dtype=np.float64).mean((1, 2, 3)))


def small(image: np.ndarray) -> np.ndarray:
    """[B, 64, 64, C] -> [B, 16 * 16 * C], by averaging."""
    b, h, w, c = image.shape
    return image.reshape(b, 16, h // 16, 16, w // 16, c).mean((2, 4)).reshape(b, -1)


def nearest(image: np.ndarray, references: np.ndarray) -> np.ndarray:
    """For each picture, which reference lies nearest at 16 x 16."""
    a, b = small(image), small(references)
    return np.argmin(np.square(b).sum(1) - 2 * a @ b.T, 1)


def background(image: np.ndarray) -> list[str]:
    """The name of the colour nearest to the mean of a picture's four corners, 4 x 4 pixels each."""
    corners = np.concatenate(
        [image[:, y, x] for y in (slice(4), slice(-4, None)) for x in (slice(4), slice(-4, None))], 1
    )
    colours = np.array(list(emoji.BACKGROUNDS.values())) / 127.5 - 1
    distance = np.square(corners.mean((1, 2))[:, None] - colours).sum(-1)
    return [list(emoji.BACKGROUNDS)[i] for i in distance.argmin(1)]


def on_white(draw: Draw, chosen: Sequence[int]) -> dict[str, float]:
    """R@1 among all emoji and mean PSNR, for the names of the chosen emoji."""
    names, rgba = emoji.load()
    references = emoji.over(rgba, emoji.BACKGROUNDS["white"])
    drawn = draw([names[i] for i in chosen])
    return {
        "names": len(chosen),
        "R@1": float(np.mean(nearest(drawn, references) == np.array(chosen))),
        "PSNR": float(psnr(drawn, references[np.array(chosen)]).mean()),
    }


def on_held_out(draw: Draw, pairs: Sequence[tuple[int, str]]) -> dict[str, float]:
    """For (emoji, colour) pairs: how often the background is right, and the emoji among all on that background."""
    names, rgba = emoji.load()
    drawn = draw([emoji.caption(names[i], colour) for i, colour in pairs])
    right = np.array([found == colour for found, (_, colour) in zip(background(drawn), pairs)])
    found = np.zeros(len(pairs), bool)
    for colour in {colour for _, colour in pairs}:
        references = emoji.over(rgba, emoji.COLOURS[colour])
        mine = np.array([k for k, pair in enumerate(pairs) if pair[1] == colour])
        found[mine] = nearest(drawn[mine], references) == np.array([pairs[k][0] for k in mine])
    return {"pairs": len(pairs), "background": float(right.mean()), "emoji": float(found.mean())}


def held_out_pairs(names: Sequence[str]) -> list[tuple[int, str]]:
    """One pair never trained on for each emoji that has one, the colours taken in turn."""
    pairs = []
    for i, name in enumerate(names):
        colours = [c for c in emoji.COLOURS if emoji.held_out(name, c)]
        pairs += [(i, colours[i % len(colours)])] if colours else []
    return pairs


def reconstruction(pipe, params, chosen: Sequence[int], size: int = 64) -> float:
    """The autoencoder's mean PSNR on white, in dB."""
    images = emoji.over(emoji.load().rgba[np.array(chosen)], emoji.BACKGROUNDS["white"])
    decode = jax.jit(lambda image: apply(pipe.vae, params["vae"], image))
    again = np.concatenate([decode(image) for image in chunks(images, size)])[: len(images)]
    return float(psnr(again.clip(-1, 1), images).mean())


def chunks(array: np.ndarray, size: int) -> list[np.ndarray]:
    """Pieces of equal size; the last is filled up with the first element."""
    filled = np.concatenate([array, np.repeat(array[:1], -len(array) % size, 0)])
    return [filled[i : i + size] for i in range(0, len(filled), size)]


def painter(pipe, params, steps: int, guidance: float, seed: int = 0, size: int = 64) -> Draw:
    """Captions -> pictures, through the pipeline; caption number i has a key of its own."""
    generate = jax.jit(pipe.generate)

    def draw(captions: Sequence[str]) -> np.ndarray:
        pictures = []
        for n, prompts in enumerate(chunks(np.array(captions), size)):
            inputs = pipe.prepare_inputs(
                prompt=[str(p) for p in prompts], num_inference_steps=steps, guidance_scale=guidance
            )
            pictures.append(np.asarray(generate(params, jax.random.fold_in(jax.random.key(seed), n), inputs)) * 2 - 1)
        return np.concatenate(pictures)[: len(captions)]

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji", help="emoji, emoji-flow or a folder (default: emoji)")
    parser.add_argument("--steps", type=int, help="by default the model's own")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="take only every n-th name and pair")
    args = parser.parse_args()

    pipe, params = flaxdiff.load(args.model, dtype="float32")
    own = {**pipe.defaults, **dict(dict(pipe.settings).get("defaults", ()))}
    steps = args.steps or own["num_inference_steps"]
    names = emoji.load().names
    chosen, pairs = range(0, len(names), args.every), held_out_pairs(names)[:: args.every]
    draw = painter(pipe, params, steps, args.guidance, args.seed)
    figures = {
        "settings": {"steps": steps, "guidance_scale": args.guidance, "seed": args.seed},
        "autoencoder_PSNR": reconstruction(pipe, params, chosen),
        "on_white": on_white(draw, chosen),
        "held_out": on_held_out(draw, pairs),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
