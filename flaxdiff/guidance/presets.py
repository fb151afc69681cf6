"""What pipelines use by name: functions of strengths, whose parameters are what a call takes."""

import jax
import jax.numpy as jnp

from flaxdiff.guidance.attentive import excite, sag
from flaxdiff.guidance.concepts import ledits, safe, sega
from flaxdiff.guidance.free import cfg, rescale, text_and_image, together
from flaxdiff.guidance.perturbed import pag, slg
from flaxdiff.guidance.rules import Each, Flags, Guidance, Layers, chain, per_image

Strength = jax.Array | float


def standard(
    guidance_scale: Strength, guidance_rescale: Strength = 0.0, image_guidance_scale: Strength | None = None
) -> Guidance:
    """What pipelines use unless told otherwise: `cfg`, or `text_and_image` where a picture guides; then `rescale`."""
    rule = cfg(guidance_scale) if image_guidance_scale is None else text_and_image(guidance_scale, image_guidance_scale)
    return chain(rule, rescale(guidance_rescale))


def true_cfg(true_cfg_scale: Strength = 1.0) -> Guidance:
    """`cfg` by a name of its own, for networks that take a `guidance_scale` as they take the time."""
    return cfg(true_cfg_scale)


def of_each_half(guidance_scale: Strength, guidance_rescale: Strength = 0.0) -> Guidance:
    """`standard`, "negative_text" saying of a text what "negative" says of a picture: what UniDiffuser is guided by."""
    return together(chain(cfg(guidance_scale), rescale(guidance_rescale)), "negative_text")


def perturbed(
    guidance_scale: Strength,
    guidance_rescale: Strength = 0.0,
    pag_scale: Strength = 3.0,
    pag_adaptive_scale: Strength = 0.0,
    pag_applied_layers: Flags = Layers(["mid"]),
) -> Guidance:
    """`standard` with `pag`: what the pipelines with PAG in their name use."""
    away = pag(pag_scale, pag_applied_layers, pag_adaptive_scale)
    return chain(cfg(guidance_scale), away, rescale(guidance_rescale))


def layer_skipping(
    guidance_scale: Strength,
    skip_layer_guidance_scale: Strength = 2.8,
    skip_layer_guidance_start: Strength = 0.01,
    skip_layer_guidance_stop: Strength = 0.2,
    skip_guidance_layers: Flags = Layers(()),
) -> Guidance:
    """`cfg`, and where blocks are named and there is a prompt to avoid `slg`: what Stable Diffusion 3 uses.

    It counts in the steps that lie between two shares of the run.
    """
    away = slg(skip_layer_guidance_scale, skip_guidance_layers)

    def combine(state, guess, predictions, at):
        if "slg" not in predictions:
            return guess, state
        i, n = (count.astype(jnp.float32) for count in (at.sampler.index, at.sampler.plan.steps))
        on = (i > n * skip_layer_guidance_start) & (i < n * skip_layer_guidance_stop)
        on = per_image(on, guess).astype(bool)
        return jnp.where(on, away.combine(state, guess, predictions, at)[0], guess), state

    branches = lambda so_far: away.branches(so_far) if len(skip_guidance_layers) and "negative" in so_far else so_far
    return chain(cfg(guidance_scale), Guidance(combine, branches=branches))


def self_attention(guidance_scale: Strength, guidance_rescale: Strength = 0.0, sag_scale: Strength = 0.75) -> Guidance:
    """`standard` with `sag`: what `StableDiffusionSAGPipeline` uses."""
    return chain(cfg(guidance_scale), sag(sag_scale), rescale(guidance_rescale))


def away_from_harm(
    guidance_scale: Strength,
    guidance_rescale: Strength = 0.0,
    sld_guidance_scale: Strength = 1000.0,
    sld_warmup_steps: Strength = 10,
    sld_threshold: Strength = 0.01,
    sld_momentum_scale: Strength = 0.3,
    sld_mom_beta: Strength = 0.4,
) -> Guidance:
    """`standard` with `safe`: what `StableDiffusionPipelineSafe` uses."""
    strengths = sld_guidance_scale, sld_warmup_steps, sld_threshold, sld_momentum_scale, sld_mom_beta
    return chain(cfg(guidance_scale), safe(guidance_scale, *strengths), rescale(guidance_rescale))


def semantic(
    guidance_scale: Strength,
    guidance_rescale: Strength = 0.0,
    edit_momentum_scale: Strength = 0.1,
    edit_mom_beta: Strength = 0.4,
    edit_guidance_scale: Strength = Each(5.0),
    edit_threshold: Strength = Each(0.9),
    edit_weights: Strength = Each(1.0),
    edit_warmup_steps: Strength = Each(10.0),
    edit_cooldown_steps: Strength = Each("inf"),
    reverse_editing_direction: Strength = Each(0.0),
) -> Guidance:
    """`standard` with `sega`: what `SemanticStableDiffusionPipeline` uses."""
    towards = sega(
        edit_momentum_scale,
        edit_mom_beta,
        edit_guidance_scale=edit_guidance_scale,
        edit_threshold=edit_threshold,
        edit_weights=edit_weights,
        edit_warmup_steps=edit_warmup_steps,
        edit_cooldown_steps=edit_cooldown_steps,
        reverse_editing_direction=reverse_editing_direction,
    )
    return chain(cfg(guidance_scale), towards, rescale(guidance_rescale))


def attended(
    guidance_scale: Strength,
    guidance_rescale: Strength = 0.0,
    excited_tokens: jax.Array | None = None,
    excited_steps: jax.Array | None = None,
    excited_thresholds: jax.Array | None = None,
    max_iter_to_alter: Strength = 25,
    scale_factor: Strength = 20,
) -> Guidance:
    """`standard` with `excite`: what `StableDiffusionAttendAndExcitePipeline` uses."""
    move = excite(excited_tokens, excited_steps, excited_thresholds, max_iter_to_alter, scale_factor)
    return chain(cfg(guidance_scale), move, rescale(guidance_rescale))


def edited(
    editing_tokens: jax.Array | None = None,
    editing_mask: jax.Array | None = None,
    use_cross_attn_mask: Strength = 0.0,
    use_intersect_mask: Strength = 1.0,
    attention_alone_above: Strength = 800,
    edit_guidance_scale: Strength = Each(5.0),
    edit_threshold: Strength = Each(0.9),
    edit_warmup_steps: Strength = Each(0.0),
    edit_cooldown_steps: Strength = Each("inf"),
    reverse_editing_direction: Strength = Each(0.0),
) -> Guidance:
    """`ledits`: what the pipelines of LEDITS++ use."""
    return ledits(
        editing_tokens,
        1.0 if editing_mask is None else editing_mask,
        use_cross_attn_mask,
        use_intersect_mask,
        attention_alone_above,
        edit_guidance_scale=edit_guidance_scale,
        edit_threshold=edit_threshold,
        edit_warmup_steps=edit_warmup_steps,
        edit_cooldown_steps=edit_cooldown_steps,
        reverse_editing_direction=reverse_editing_direction,
    )
