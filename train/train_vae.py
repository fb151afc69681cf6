"""Train an autoencoder on the emoji: the launch script of configs/emoji_vae.json.

Pictures lie over white, over the ten colours or over any colour, mirrored and shifted at random, so that the latent
space knows more than the few pictures that the diffusion model will see.
"""

from collections.abc import Iterable

import jax
import numpy as np
import optax

from flaxdiff.checkpoint import save_model
from flaxdiff.core import Params, Spec, apply, init
from flaxdiff.models.autoencoder_kl import AutoencoderKL
from flaxdiff.training import adversarial, emoji, loop, state


def batch_at(rgba: np.ndarray, size: int, seed: int, step: int) -> dict[str, np.ndarray]:
    """Augmented pictures over random backgrounds: a pure function of the seed and the step."""
    rng = np.random.default_rng((seed, step))
    chosen = rgba[rng.integers(len(rgba), size=size)]
    plain = np.array(list(emoji.BACKGROUNDS.values()))[np.maximum(rng.integers(-8, 11, size), 0)]  # white half the time
    colour = np.where(rng.random((size, 1)) < 0.2, rng.integers(0, 256, (size, 3)), plain)
    pictures = []
    for picture, (dy, dx), mirrored in zip(chosen, rng.integers(-6, 7, (size, 2)), rng.random(size) < 0.5):
        padded = np.pad(picture[:, ::-1] if mirrored else picture, ((6, 6), (6, 6), (0, 0)))
        pictures.append(padded[6 + dy : 70 + dy, 6 + dx : 70 + dx] if rng.random() < 0.5 else padded[6:70, 6:70])
    return {"image": emoji.over(np.stack(pictures), colour)}


def standardised(spec: Spec, params: Params, images: Iterable[np.ndarray]) -> Params:
    """The same autoencoder with latents of mean 0 and deviation 1 in each channel, so that `scaling_factor` is 1.

    The two 1x1 convolutions around the latent take up the shift and the scale.
    """
    encode = jax.jit(lambda image: apply(spec, params, image, method="encode").mean)
    latents = np.concatenate([encode(image) for image in images])
    mean, deviation = latents.mean((0, 1, 2)), latents.std((0, 1, 2))
    scale, shift = np.r_[1 / deviation, np.ones_like(mean)], np.r_[mean / deviation, 2 * np.log(deviation)]
    into, out = params["quant_conv.weight"], params["post_quant_conv.weight"]
    return params | {
        "quant_conv.weight": into * scale,
        "quant_conv.bias": params["quant_conv.bias"] * scale - shift,
        "post_quant_conv.weight": out * deviation[:, None],
        "post_quant_conv.bias": params["post_quant_conv.bias"] + mean @ out[0, 0],
    }


def main() -> None:
    config, out = loop.arguments(__doc__)

    spec = AutoencoderKL.from_config(config["vae"])
    cycles = [
        dict(init_value=0, peak_value=peak, warmup_steps=steps // 30, decay_steps=steps)
        for steps, peak in config["cycles"]
    ]
    rate, total = optax.sgdr_schedule(cycles), sum(steps for steps, _ in config["cycles"])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    key = jax.random.key(config["seed"])
    start = state.create({"vae": init(spec, key)}, tx)
    # for each number of a picture, of which there are six to one of its latent
    loss = adversarial.autoencoding(spec, adversarial.gaussian(6e-4), rec_loss="edges")
    step = state.jitted(loss, tx, config["decay"])

    rgba = emoji.load().rgba
    data = lambda n: batch_at(rgba, config["batch_size"], config["seed"], n)
    final = loop.fit(step, start, data, key, total, directory=out / "checkpoints/vae", save_every=200, log_every=20)

    everything = (emoji.over(rgba[:, None][i::33], list(emoji.BACKGROUNDS.values())) for i in range(33))
    images = (image.reshape(-1, *image.shape[2:]) for image in everything)
    save_model(out / "vae", spec, standardised(spec, state.averaged(final)["vae"], images))


if __name__ == "__main__":
    main()
