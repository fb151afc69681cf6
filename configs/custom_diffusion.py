"""Custom Diffusion: a word, "<new1>", and keys and values of the cross-attentions, from pictures of a cat.

    flaxdiff train configs/custom_diffusion.py

Needs pictures of it in data/cat. Of other cats 200 are drawn, less what real_reg/samples_cat holds.

In miniature, by train/in_miniature.py on a CPU, 2026-11-29, 100 updates bring the validation loss from 1.67 to 0.584.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "dreambooth",
    recipe="custom_diffusion",
    pretrained_model_name_or_path="CompVis/stable-diffusion-v1-4",
    train_data="data/cat",
    instance_prompt="photo of a <new1> cat",
    placeholder_token="<new1>",
    initializer_token="ktn",
    with_prior_preservation=True,
    class_data="real_reg/samples_cat",
    class_prompt="cat",
    num_class_images=200,
    random_flip=True,
    learning_rate=1e-5,
    scale_lr=True,
    max_train_steps=250,
    train_batch_size=4,
    validation_prompt="<new1> cat sitting in a bucket",
    output="runs/custom_diffusion",
)
