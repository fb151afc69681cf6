"""Guidance: how the answers of a network to several questions become one; see `rules.py` first.

free.py         a prompt and its opposite, and what keeps a strong guess within bounds
perturbed.py    comparison with the network itself, hindered
attentive.py    what the network attends to
concepts.py     further prompts
gradient.py     the slope of any loss
presets.py      what pipelines use by name
"""

from flaxdiff.guidance.attentive import excite, pix2pix_zero, sag
from flaxdiff.guidance.concepts import ledits, safe, sega
from flaxdiff.guidance.free import (
    apg,
    cfg,
    frequency_decoupled,
    rescale,
    tangential,
    text_and_image,
    together,
    zero_star,
)
from flaxdiff.guidance.gradient import by_loss
from flaxdiff.guidance.perturbed import autoguidance, pag, reference, seg, slg
from flaxdiff.guidance.presets import (
    attended,
    away_from_harm,
    edited,
    layer_skipping,
    of_each_half,
    perturbed,
    self_attention,
    semantic,
    standard,
    true_cfg,
)
from flaxdiff.guidance.rules import At, Curve, Each, Guidance, Layers, Numbers, chain, interval, stateless

__all__ = [
    "At",
    "Curve",
    "Each",
    "Guidance",
    "Layers",
    "Numbers",
    "apg",
    "attended",
    "autoguidance",
    "away_from_harm",
    "by_loss",
    "cfg",
    "chain",
    "edited",
    "excite",
    "frequency_decoupled",
    "interval",
    "layer_skipping",
    "ledits",
    "of_each_half",
    "pag",
    "perturbed",
    "pix2pix_zero",
    "reference",
    "rescale",
    "safe",
    "sag",
    "seg",
    "sega",
    "self_attention",
    "semantic",
    "slg",
    "standard",
    "stateless",
    "tangential",
    "text_and_image",
    "true_cfg",
    "together",
    "zero_star",
]
