"""Checkpoints: models and pipelines in the layout of diffusers and transformers, read and written without PyTorch.

`load` and `save` are the two ends. Between them: `hub` (a name -> a folder), `files` (which file holds the weights),
`safetensors` and `pickles` (a file -> tensors, not read yet), `convert` (tensors <-> our parameters).
"""

from flaxdiff.checkpoint.load import load_model as load_model
from flaxdiff.checkpoint.save import save_model as save_model
