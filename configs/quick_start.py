"""A LoRA of the shipped text-to-emoji model, on the emoji that it knows: a run to try everything with.

    flaxdiff train configs/quick_start.py

Needs no accelerator and no download but a font, see docs/training.md.

In miniature, by train/in_miniature.py on a CPU, 2026-11-30, 100 updates bring the validation loss from 1.62 to 0.542.
"""

from flaxdiff.training.config import Adapter, Config, Data, Optimizer, Run

config = Config(
    recipe="lora",
    data=Data("emoji", resolution=64),
    adapter=Adapter(rank=8),
    optimizer=Optimizer(learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=20),
    run=Run("runs/quick_start", max_train_steps=200, checkpointing_steps=100, logging_steps=10),
)
