"""A ControlNet of Stable Diffusion 1.5 that fills circles with colours, as the text says.

    flaxdiff train configs/controlnet_sd15.py

Downloads model and data from the Hub, and sees each of the 50,000 pictures once. To look on, add
--validation-image circle.png --validation-prompt "red circle with blue background".

In miniature, by train/in_miniature.py on a CPU, 2026-11-30, 300 updates bring the validation loss from 0.274 to 0.25.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "text_to_image_sd15",
    recipe="controlnet",
    train_data="fusing/fill50k",
    center_crop=False,
    random_flip=False,
    max_train_steps=12_500,
    use_ema=False,
    output="runs/controlnet_sd15",
)
