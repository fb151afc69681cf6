"""Rules that follow the slope of a loss."""

from collections.abc import Callable

import jax

from flaxdiff.guidance.rules import At, Guidance, Predictions, per_image


def by_loss(
    loss: Callable[[jax.Array], jax.Array],
    scale: jax.Array | float,
    of_pictures: bool = False,
    branch: str = "positive",
) -> Guidance:
    """Guidance by any differentiable loss, such as a classifier's: eps + scale sigma d loss(x_0(x)) / dx.

    The slope goes through the network. What the network predicts, noise or something else, does not matter.

    Args:
      loss: x_0 [B, ...] -> [B], smaller is better: e.g. minus the logarithm of a class's probability.
      scale: how much the loss counts against the network.
      of_pictures: whether the loss is of decoded pictures [B, H, W, C] in [-1, 1], and not of latents.
      branch: whose x_0.

    >>> def reddish(guidance_scale, red_scale=30.0):
    ...     loss = lambda pictures: -(pictures[..., 0] - pictures[..., 1]).mean((1, 2))
    ...     return chain(cfg(guidance_scale), by_loss(loss, red_scale, of_pictures=True))
    >>> import flaxdiff
    >>> from flaxdiff.guidance import cfg, chain
    >>> pipe, params = flaxdiff.load()
    >>> pipe = pipe.replace(guidance=reddish)
    >>> float(pipe.prepare_inputs(prompt="cat", red_scale=20.0)["guidance"]["red_scale"])
    20.0

    Reference: Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021; Bansal et al., Universal
    Guidance for Diffusion Models, 2023.
    """

    def combine(state, guess, predictions: Predictions, at: At):
        plan, i = at.sampler.plan, at.sampler.index

        def total(x: jax.Array) -> jax.Array:
            x0 = plan.x0_sample[i] * x + plan.x0_output[i] * at.ask(x, [branch]).predictions[branch]
            return loss(at.decode(x0) if of_pictures else x0).sum()

        noise = per_image(scale, guess) * plan.sigma[i] * jax.grad(total)(at.sampler.sample)
        x0 = -plan.sigma[i] / plan.alpha[i] * noise
        return guess + x0 / plan.x0_output[i], state

    return Guidance(combine)
