"""Losses of two networks against each other: one makes pictures, the other tells them from real ones.

A critic is any function (params, x, batch) -> logits, one for a picture or one for each patch of it. Either side is a
loss of its own in the sense of `state.Loss`, with the other side's parameters frozen: keep a `TrainState` for each, and
let them take turns, or make one loss of both by `together`. Autoencoders weigh the critic against the reconstruction by
their gradients at the last layer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff.core import Params, Spec, apply
from flaxdiff.training import losses
from flaxdiff.training.losses import Batch
from flaxdiff.training.state import Loss

Critic = Callable[[Any, jax.Array, Any], jax.Array]  # (params, pictures or latents [B, ...], batch) -> logits

# What the critic pays for logits of real and of made pictures.
DISC_LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "hinge": lambda real, fake: (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2,
    "vanilla": lambda real, fake: (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()) / 2,
}


def critic(
    judge: Critic,
    make: Callable[[Any, Batch, jax.Array], jax.Array],
    real: str = "image",
    *,
    disc_loss: str = "hinge",
    r1: float = 0.0,
) -> Loss:
    """What the critic minimises: ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))], or softplus in place of max.

    Args:
      judge: the critic.
      make: (params, batch, key) -> x̂; no gradient goes through it.
      real: the key of x in the batch.
      disc_loss: "hinge" or "vanilla".
      r1: so much of E ‖∇D(x)‖² is added.

    Raises:
      ValueError: another `disc_loss`.

    Reference: Lim and Ye, Geometric GAN, 2017; Mescheder et al., Which Training Methods for GANs do actually Converge?,
    2018 (R1).
    """
    if disc_loss not in DISC_LOSSES:
        raise ValueError(f"disc_loss={disc_loss!r} is not known; use one of {sorted(DISC_LOSSES)}.")

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x, fake = batch[real], jax.lax.stop_gradient(make(params, batch, key))
        of_real, of_fake = judge(params, x, batch), judge(params, fake, batch)
        value = DISC_LOSSES[disc_loss](of_real, of_fake)
        if r1:
            slope = jax.grad(lambda x: judge(params, x, batch).sum())(x)
            value += r1 * jnp.square(slope).sum(range(1, slope.ndim)).mean()
        return value, {"logits_real": of_real.mean(), "logits_fake": of_fake.mean()}

    return loss


# --- autoencoders ----------------------------------------------------------------------------------------------------

# (spec, parameters, image, key) -> (what the decoder is given, what it costs)
Bottleneck = Callable[[Spec, Params, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def gaussian(kl_scale: float = 1e-6) -> Bottleneck:
    """A sample of the posterior, at `kl_scale` times its KL divergence from N(0, I) for each number in a picture."""

    def bottleneck(spec: Spec, params: Params, image: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        posterior = apply(spec, params, image, method="encode")
        return posterior.sample(key), kl_scale * posterior.kl().sum() / image.size

    return bottleneck


def codebook(beta: float = 0.25, *, legacy: bool = True) -> Bottleneck:
    """A VQModel's latent z, at the cost of its distance to the nearest entries e.

    E ‖sg(e) - z‖² (commitment) + β E ‖e - sg(z)‖² (codebook) as diffusers has it; the paper's β is on the other term.

    Args:
      beta: β.
      legacy: False puts β on the commitment, as in the paper.

    Reference: van den Oord et al., Neural Discrete Representation Learning, 2017, equation 3.
    """

    def bottleneck(spec: Spec, params: Params, image: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = apply(spec, params, image, method="encode").mean
        codes = apply(spec, params, image, method="codes")
        e, fixed = params["quantize.embedding.weight"][codes], jax.lax.stop_gradient
        commitment, moving = jnp.square(fixed(e) - z).mean(), jnp.square(e - fixed(z)).mean()
        return z, commitment + beta * moving if legacy else beta * commitment + moving

    return bottleneck


# What the difference [B, H, W, C] between a picture and what was made of it costs.
PIXELS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "l1": lambda error: jnp.abs(error).mean(),
    "l2": lambda error: jnp.square(error).mean(),
    "edges": lambda error: losses.pictures(error)[0],
}


def remade(spec: Spec, bottleneck: Bottleneck, component: str = "vae") -> Callable[[Any, Batch, jax.Array], jax.Array]:
    """What an autoencoder makes of the batch's "image", as `critic` wants it."""

    def make(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        z, _ = bottleneck(spec, params[component], batch["image"], key)
        return apply(spec, params[component], z, method="decode")

    return make


def autoencoding(
    spec: Spec,
    bottleneck: Bottleneck,
    judge: Critic | None = None,
    *,
    rec_loss: str = "l1",
    disc_scale: float = 1.0,
    component: str = "vae",
    last: str = "decoder.conv_out.weight",
) -> Loss:
    """Reconstruction + bottleneck + λ · `disc_scale` · -E D(x̂), with λ = ‖∇ reconstruction‖ / ‖∇ E D(x̂)‖ at `last`.

    λ, at most 10⁴, makes both sides pull equally hard at the decoder's last weight. Without `judge` there is no
    adversary: what a run begins with, `--disc_start`.

    Args:
      spec: an AutoencoderKL or a VQModel, whose parameters are `params[component]`.
      bottleneck: `gaussian(kl_scale)` or `codebook(beta)`.
      judge: the critic, of the made pictures [B, H, W, C].
      rec_loss: "l1" or "l2", a mean over pictures and numbers, or "edges", see `losses.pictures`.
      disc_scale: of the adversary.
      component, last: where the decoder's last weight is.

    The batch holds "image" [B, H, W, C] in [-1, 1].

    Reference: Esser et al., Taming Transformers for High-Resolution Image Synthesis, 2021, equation 7.
    """
    if rec_loss not in PIXELS:
        raise ValueError(f"rec_loss={rec_loss!r} is not known; use one of {sorted(PIXELS)}.")

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        own = params[component]
        z, cost = bottleneck(spec, own, batch["image"], key)
        decode = lambda w: apply(spec, {**own, last: w}, z, method="decode")
        image, pull = jax.vjp(decode, own[last])
        far = lambda image: PIXELS[rec_loss](image - batch["image"])
        metrics = {"reconstruction": far(image), "bottleneck": cost, "psnr": losses.pictures(image - batch["image"])[1]}
        if judge is None:
            return metrics["reconstruction"] + cost, metrics
        fools = lambda image: -judge(params, image, batch).mean()
        norm = lambda f: jnp.linalg.norm(pull(jax.grad(f)(image))[0])
        balance = jnp.clip(norm(far) / (norm(fools) + 1e-4), 0, 1e4)
        balance = disc_scale * jax.lax.stop_gradient(balance)
        metrics |= {"generator": fools(image), "disc_weight": balance}
        return metrics["reconstruction"] + cost + balance * metrics["generator"], metrics

    return loss


def together(make: Loss, judge: Loss, maker: str, rival: str) -> Loss:
    """Both sides' losses as one: each moves its own component of the parameters, and sees the other's as it is.

    Args:
      make: what the maker minimises.
      judge: what the critic minimises, see `critic`.
      maker, rival: the names of their components.
    """

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        still = lambda name: {**params, name: jax.lax.stop_gradient(params[name])}
        value, metrics = make(still(rival), batch, key)
        cost, more = judge(still(maker), batch, key)
        return value + cost, {**metrics, **more, "critic": cost}

    return loss
