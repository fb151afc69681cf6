"""Training as pure functions: a step, a loop that resumes, losses; data and figures of the model that we ship."""

from flaxdiff.training.loop import fit as fit
from flaxdiff.training.losses import decoding as decoding
from flaxdiff.training.losses import denoising as denoising
from flaxdiff.training.noising import path_of as path_of
from flaxdiff.training.state import TrainState as TrainState
from flaxdiff.training.state import averaged as averaged
from flaxdiff.training.state import train_step as train_step
