"""DDPO: a LoRA of Stable Diffusion 1.5 strengthens what a reward likes; here, bright pictures.

    flaxdiff train configs/ddpo.py

Downloads model and captions from the Hub. Another reward is a function, pictures [B, H, W, 3] in [0, 1] -> [B]:
--reward module:function.

In miniature, by train/in_miniature.py on a CPU, 2026-11-29, 100 updates bring the reward from 0.452 to 0.498.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "lora_sd15",
    recipe="ddpo_lora",
    learning_rate=3e-4,
    lr_scheduler="constant",
    adam_weight_decay=1e-4,
    guidance_scale=5.0,
    sample_batch_size=24,
    train_batch_size=24,
    gradient_accumulation_steps=1,
    max_train_steps=10_000,
    mixed_precision="no",
    validation_prompt=None,
    output="runs/ddpo",
)
