"""Train a text-to-image model on the emoji: the launch script of configs/emoji_text_to_image.json and emoji_flow.json.

The autoencoder and the text encoder come from the model's folder. The first stays as it is, so every picture's latent
is computed once. Half of the captions put the emoji on a colour; a tenth are empty, for classifier-free guidance.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flaxdiff
from flaxdiff import registry
from flaxdiff.core import apply, frozen, init
from flaxdiff.nn.attention import seen
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.text import Tokenizer
from flaxdiff.schedulers.tables import image_keys
from flaxdiff.training import diffusion, emoji, loop, losses, noising, optimizers, state


def assembled(config: Mapping[str, Any], folder: Path, key: jax.Array) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The pipeline that a configuration names: its parts are read from a folder, but for a new network."""
    specs, params = {}, {}
    for part, kind in config["components"].items():
        model = registry.find(kind, "model")
        if part in config:  # layer by layer: what attention sees is asked for
            specs[part] = model.from_config({**config[part], "scan_layers": False})
            params[part] = init(specs[part], key)
        else:
            specs[part], params[part] = model.from_pretrained(folder, subfolder=part)
    pipe = registry.find(config["pipeline"], "pipeline")(
        specs=tuple(specs.items()),
        scheduler=registry.find(config["scheduler"]["_class_name"], "scheduler").from_config(config["scheduler"]),
        tokenizers=(("tokenizer", Tokenizer(str(folder / "tokenizer"), config["tokenizer"])),),
        settings=frozen(config["settings"]),
    )
    return pipe, params


def all_latents(folder: Path, encode: Callable[[np.ndarray], jax.Array], rgba: np.ndarray) -> np.ndarray:
    """The latent of every emoji on every background, [emoji, background, h, w, c]; kept in a file once computed."""
    path = folder / "checkpoints/latents.npy"
    if not path.exists():
        colours = list(emoji.BACKGROUNDS.values())
        latents = np.stack([encode(emoji.over(np.repeat(picture[None], len(colours), 0), colours)) for picture in rgba])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, latents)
    return np.load(path)


def astray(q: jax.Array, k: jax.Array, grid: int, first: int) -> jax.Array:
    """The mean -log weight that positions of a square map give to the token of the cell in which they lie.

    The tokens of the cells are grid² of the keys, from the first; of the last keys where that is negative.
    """
    n, m = q.shape[1], k.shape[1]
    log_weights = jax.nn.log_softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k))
    y, x = np.divmod(np.arange(n), int(n**0.5))
    cell = y * grid // int(n**0.5) * grid + x * grid // int(n**0.5)
    return -log_weights[:, :, np.arange(n), first % m + cell].mean()


def main() -> None:
    config, out = loop.arguments(__doc__)

    names, rgba = emoji.load()
    key = jax.random.key(config["seed"])
    pipe, params = assembled(config, out, key)
    encode = jax.jit(lambda image: apply(pipe.vae, params["vae"], image, method="encode").mean)
    latents = all_latents(out, encode, rgba)

    def data(n: int) -> dict[str, Any]:
        seed, size = config["seed"], config["batch_size"]
        chosen, background, captions = emoji.batch(names, size, seed, n, composed=config["composed"])
        dropped = np.random.default_rng((seed, n, 1)).random(size) < config["uncaptioned"]
        told = diffusion.conditions(pipe, prompt=["" if d else c for c, d in zip(captions, dropped)])
        return {"conditions": told, "latents": latents[chosen, background]}

    denoise = losses.denoising(diffusion.predict(pipe), noising.path_of(pipe.scheduler))
    length = pipe.tokenizer.loaded.model_max_length

    def loss(params, batch, key):
        """Denoising; and attention is told where in the picture the text encoder put what."""
        with seen() as pairs:
            value, metrics = denoise(params, {**batch, "keys": image_keys(key, len(batch["latents"]))}, key)
        read = [(q, k) for q, k in pairs if q.shape[1] != k.shape[1] == length]
        wrong = jnp.stack([astray(q, k, config["grid"], config["first"]) for q, k in read]).mean()
        return value + config["routing"] * wrong, {"denoising": value, "astray": wrong, **metrics}

    rate = optimizers.schedule("cosine", config["learning_rate"], config["steps"], config["warmup"])
    tx = optimizers.optimizer(config["optimizer"], rate, b2=0.99, factors=config["rates"])
    trained = "|".join(path for path, _ in config["rates"])
    step, start = state.jitted(loss, tx, config["decay"]), state.create(params, tx, trainable=trained)
    folder = out / "checkpoints/denoiser"
    final = loop.fit(step, start, data, key, config["steps"], directory=folder, save_every=250, log_every=50)
    flaxdiff.save(out, pipe, state.averaged(final))


if __name__ == "__main__":
    main()
