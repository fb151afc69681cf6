"""Guidance: how the answers of a network to several questions become one; see `rules.py` first.

`free.py` has the rules for a prompt and its opposite, `perturbed.py` those that compare the network with a worse one,
`attentive.py` those that read what it attends to, `concepts.py` those with further prompts. `presets.py` has what
pipelines use by name.
"""

from flaxdiff.guidance.attentive import sag
from flaxdiff.guidance.concepts import safe, sega
from flaxdiff.guidance.free import (
    apg,
    cfg,
    frequency_decoupled,
    rescale,
    tangential,
    text_and_image,
    zero_star,
)
from flaxdiff.guidance.perturbed import pag, seg, slg
from flaxdiff.guidance.presets import away_from_harm, perturbed, self_attention, semantic, standard
from flaxdiff.guidance.rules import At, Each, Guidance, Layers, chain, interval, stateless

__all__ = [
    "At",
    "Each",
    "Guidance",
    "Layers",
    "apg",
    "away_from_harm",
    "cfg",
    "chain",
    "frequency_decoupled",
    "interval",
    "pag",
    "perturbed",
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
    "zero_star",
]
