"""Train a text-to-image UNet on the emoji: the launch script of configs/emoji_text_to_image.json.

The autoencoder and the text encoder come from the model's folder and stay as they are, so every picture's latent is
computed once. Half of the captions put the emoji on a colour; a tenth are empty, for classifier-free guidance.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.checkpoint import save_model
from flaxdiff.core import apply, init
from flaxdiff.models.autoencoder_kl import AutoencoderKL
from flaxdiff.models.clip import CLIPTextModel
from flaxdiff.models.unet_2d_condition import UNet2DConditionModel
from flaxdiff.nn.attention import seen
from flaxdiff.pipelines.text import Tokenizer
from flaxdiff.schedulers import DDIMScheduler
from flaxdiff.training import emoji, loop, losses, noising, optimizers, state


def all_latents(folder: Path, rgba: np.ndarray) -> np.ndarray:
    """The latent of every emoji on every background, [emoji, background, h, w, c]; kept in a file once computed."""
    path = folder / "checkpoints/latents.npy"
    if not path.exists():
        spec, params = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        encode = jax.jit(lambda image: apply(spec, params, image, method="encode").mean)
        colours = list(emoji.BACKGROUNDS.values())
        latents = np.stack([encode(emoji.over(np.repeat(picture[None], len(colours), 0), colours)) for picture in rgba])
        np.save(path, latents)
    return np.load(path)


def astray(q: jax.Array, k: jax.Array, grid: int) -> jax.Array:
    """The mean -log weight that positions of a square map give to the token of the cell in which they lie.

    The tokens of the cells are the last grid² of the keys.
    """
    n, m = q.shape[1], k.shape[1]
    log_weights = jax.nn.log_softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k))
    y, x = np.divmod(np.arange(n), int(n**0.5))
    cell = y * grid // int(n**0.5) * grid + x * grid // int(n**0.5)
    return -log_weights[:, :, np.arange(n), m - grid**2 + cell].mean()


def main() -> None:
    config, out = loop.arguments(__doc__)

    names, rgba = emoji.load()
    encode = Tokenizer(str(out / "tokenizer"), "CLIPTokenizer")
    latents = all_latents(out, rgba)
    text_spec, text_params = CLIPTextModel.from_pretrained(out, subfolder="text_encoder")

    spec = UNet2DConditionModel.from_config(config["unet"])
    key = jax.random.key(config["seed"])
    params = {"text_encoder": text_params, "unet": init(spec, key)}

    def predict(params, x, t, batch):
        text = apply(text_spec, params["text_encoder"], batch["ids"]).last_hidden_state
        return apply(spec, params["unet"], x, t, encoder_hidden_states=text)

    length, grid = text_spec.config.max_position_embeddings, config["grid"]

    def data(n: int) -> dict[str, np.ndarray]:
        seed, size = config["seed"], config["batch_size"]
        chosen, background, captions = emoji.batch(names, size, seed, n, composed=config["composed"])
        dropped = np.random.default_rng((seed, n, 1)).random(size) < config["uncaptioned"]
        return {
            "ids": encode(["" if d else c for c, d in zip(captions, dropped)]),
            "latents": latents[chosen, background],
        }

    scheduler = DDIMScheduler(**config["scheduler"])
    denoise = losses.denoising(predict, noising.path_of(scheduler))

    def loss(params, batch, key):
        """Denoising; and attention is told where in the picture the text encoder put what."""
        with seen() as pairs:
            value, metrics = denoise(params, batch, key)
        wrong = jnp.stack([astray(q, k, grid) for q, k in pairs if q.shape[1] != k.shape[1] == length]).mean()
        return value + config["routing"] * wrong, {"denoising": value, "astray": wrong, **metrics}

    tx = optimizers.adam(config["learning_rate"], config["steps"], decay=0.01)
    step, start = state.jitted(loss, tx, config["decay"]), state.create(params, tx, trainable=r"unet\..*")
    folder = out / "checkpoints/unet"
    final = loop.fit(step, start, data, key, config["steps"], directory=folder, save_every=250, log_every=50)
    save_model(out / "unet", spec, state.averaged(final)["unet"])


if __name__ == "__main__":
    main()
