"""All of the transformer of Flux, on pictures of Naruto; all devices share the weights.

    flaxdiff train configs/text_to_image_flux.py

Downloads a model that asks for consent (`hf auth login` first) and data from the Hub.

In miniature, by train/in_miniature.py on a CPU, 2026-11-30, 100 updates bring the validation loss from 2.14 to 0.553.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "text_to_image_sd3",
    pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev",
    weighting_scheme="none",
    guidance_scale=1.0,
    output="runs/text_to_image_flux",
)
