"""Textual inversion: Stable Diffusion 1.5 learns a word, "<cat-toy>", from pictures; all else stays.

    flaxdiff train configs/textual_inversion.py

Downloads model and pictures from the Hub.

In miniature, by train/in_miniature.py on a CPU, 2026-11-29, 100 updates bring the validation loss from 1.71 to 0.722.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "text_to_image_sd15",
    recipe="textual_inversion",
    train_data="diffusers/cat_toy_example",
    center_crop=False,
    placeholder_token="<cat-toy>",
    initializer_token="toy",
    learning_rate=5e-4,
    scale_lr=True,
    max_train_steps=3000,
    use_ema=False,
    validation_prompt="A <cat-toy> train",
    validation_steps=100,
    output="runs/textual_inversion",
)
