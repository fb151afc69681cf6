"""Data for training: sources, examples, batches, and latents and texts that are encoded once.

source = open_source("folder")
batches = Batches.of(source, Examples(resolution=512, random_flip=True), 16, seed=0)
loader = DataLoader(batches, num_workers=4)      # next(loader), loader.get_state(), loader.set_state(state)
"""

from flaxdiff.training.data.batches import Batches as Batches
from flaxdiff.training.data.batches import Listed as Listed
from flaxdiff.training.data.batches import PriorPreservation as PriorPreservation
from flaxdiff.training.data.examples import Examples as Examples
from flaxdiff.training.data.faults import BadExample as BadExample
from flaxdiff.training.data.faults import Fault as Fault
from flaxdiff.training.data.faults import Report as Report
from flaxdiff.training.data.loader import DataLoader as DataLoader
from flaxdiff.training.data.loader import Stream as Stream
from flaxdiff.training.data.order import generate_aspect_ratio_buckets as generate_aspect_ratio_buckets
from flaxdiff.training.data.pictures import decode as decode
from flaxdiff.training.data.precompute import precompute as precompute
from flaxdiff.training.data.sources import open_source as open_source
from flaxdiff.training.data.stored import Stored as Stored
