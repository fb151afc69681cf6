"""Schedulers: every sampler as a table of numbers.

`path` holds the noise levels and what a network predicts, `spacing` which levels a run visits, `solvers` the arithmetic
of each method, `tables` the plan that comes out of them and the one function that runs it on the device. The classes
that carry diffusers' names are in `discrete`, what they share in `base`.
"""

from .base import SCHEDULERS as SCHEDULERS
from .base import Scheduler as Scheduler
from .base import from_config as from_config
from .base import read_config as read_config
from .discrete import DDIMScheduler as DDIMScheduler
from .discrete import DDPMScheduler as DDPMScheduler
from .discrete import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
from .discrete import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
from .discrete import EulerDiscreteScheduler as EulerDiscreteScheduler
from .discrete import PNDMScheduler as PNDMScheduler
from .tables import Plan as Plan
from .tables import SchedulerState as SchedulerState
from .tables import denoised as denoised
from .tables import image_keys as image_keys
from .tables import init as init
from .tables import step as step
