"""A T2I-Adapter of Stable Diffusion XL, a small network beside it, that fills circles with colours.

    flaxdiff train configs/t2i_adapter_sdxl.py

Downloads model, autoencoder and data from the Hub.

In miniature, by train/in_miniature.py on a CPU, 2026-11-29, 100 updates bring the validation loss from 0.567 to 0.532.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "controlnet_sdxl",
    recipe="t2i_adapter",
    weighting_scheme="cubic",
    output="runs/t2i_adapter_sdxl",
)
