"""Sharpen the decoder on the pictures that the model draws: the launch script of configs/emoji_decoder.json.

The encoder stays as it is, so latents keep their meaning: those that train_text_to_image.py computed are read. A
little noise on the latents stands for what the UNet gets wrong. No picture of a held-out pair is among the data.
"""

import jax
import numpy as np

from flaxdiff.checkpoint import save_model
from flaxdiff.models.autoencoder_kl import AutoencoderKL
from flaxdiff.training import emoji, loop, losses, optimizers, state


def main() -> None:
    config, out = loop.arguments(__doc__)

    names, rgba = emoji.load()
    spec, params = AutoencoderKL.from_pretrained(out, subfolder="vae")
    latents, colours = np.load(out / "checkpoints/latents.npy"), np.array(list(emoji.BACKGROUNDS.values()))

    def data(n: int) -> dict[str, np.ndarray]:
        chosen, background, _ = emoji.batch(names, config["batch_size"], config["seed"], n)
        return {"latents": latents[chosen, background], "image": emoji.over(rgba[chosen], colours[background])}

    tx = optimizers.adam(config["learning_rate"], config["steps"])
    loss = losses.decoding(spec, squares=config["squares"], noise=config["noise"])
    start = state.create(params, tx, trainable=r"decoder\..*|post_quant_conv\..*")
    step, key = state.jitted(loss, tx, config["decay"]), jax.random.key(config["seed"])
    folder = out / "checkpoints/decoder"
    final = loop.fit(step, start, data, key, config["steps"], directory=folder, save_every=250, log_every=50)
    save_model(out / "vae", spec, state.averaged(final))


if __name__ == "__main__":
    main()
