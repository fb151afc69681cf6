"""Checkpoints: models and pipelines in the layout of diffusers and transformers, read and written without PyTorch.

`reading` and `writing` handle one model, `pipelines` a whole folder of them. Beneath: `hub` (a name -> a folder),
`files` (which file holds the weights), `safetensors`, `pickles` and `msgpack` (a file -> tensors, not read yet),
`convert` (tensors <-> our parameters).
"""

from flaxdiff.checkpoint.pipelines import load as load
from flaxdiff.checkpoint.pipelines import load_pipeline as load_pipeline
from flaxdiff.checkpoint.pipelines import push_to_hub as push_to_hub
from flaxdiff.checkpoint.pipelines import save as save
from flaxdiff.checkpoint.pipelines import save_pipeline as save_pipeline
from flaxdiff.checkpoint.reading import load_model as load_model
from flaxdiff.checkpoint.writing import save_model as save_model
