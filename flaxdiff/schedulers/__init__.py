"""Schedulers: every sampler as a table of numbers.

`path` holds the noise levels and what a network predicts, `spacing` which levels a run visits, `solvers` and
`exponential` the arithmetic of each method, `tables` the plan that comes out of them and the one function that runs it
on the device. The classes that carry diffusers' names are in `discrete` (steps in training time), `sigma` and `dpm` (in
noise level and log SNR), `continuous` (flows and schedules without training times) and `consistency` (few steps); what
they share is in `base`. What is no table: `inpainting`, `score` and `tokens`. `names` knows samplers by the names that
other interfaces give them.
"""

from .adaptive import DPMSolverAdaptiveScheduler as DPMSolverAdaptiveScheduler
from .base import SCHEDULERS as SCHEDULERS
from .base import KarrasDiffusionSchedulers as KarrasDiffusionSchedulers
from .base import Scheduler as Scheduler
from .base import Scheduler as SchedulerMixin  # noqa: F401 - diffusers' name
from .base import from_config as from_config
from .base import read_config as read_config
from .consistency import CMStochasticIterativeScheduler as CMStochasticIterativeScheduler
from .consistency import ConsistencyDecoderScheduler as ConsistencyDecoderScheduler
from .consistency import LCMScheduler as LCMScheduler
from .consistency import SCMScheduler as SCMScheduler
from .consistency import TCDScheduler as TCDScheduler
from .continuous import CosineDPMSolverMultistepScheduler as CosineDPMSolverMultistepScheduler
from .continuous import DDPMWuerstchenScheduler as DDPMWuerstchenScheduler
from .continuous import EDMDPMSolverMultistepScheduler as EDMDPMSolverMultistepScheduler
from .continuous import EDMEulerScheduler as EDMEulerScheduler
from .continuous import FlowMatchEulerDiscreteScheduler as FlowMatchEulerDiscreteScheduler
from .continuous import FlowMatchHeunDiscreteScheduler as FlowMatchHeunDiscreteScheduler
from .continuous import FlowMatchLCMScheduler as FlowMatchLCMScheduler
from .continuous import IPNDMScheduler as IPNDMScheduler
from .discrete import CogVideoXDDIMScheduler as CogVideoXDDIMScheduler
from .discrete import CogVideoXDPMScheduler as CogVideoXDPMScheduler
from .discrete import DDIMInverseScheduler as DDIMInverseScheduler
from .discrete import DDIMParallelScheduler as DDIMParallelScheduler
from .discrete import DDIMScheduler as DDIMScheduler
from .discrete import DDPMParallelScheduler as DDPMParallelScheduler
from .discrete import DDPMScheduler as DDPMScheduler
from .discrete import PNDMScheduler as PNDMScheduler
from .discrete import UnCLIPScheduler as UnCLIPScheduler
from .dpm import DEISMultistepScheduler as DEISMultistepScheduler
from .dpm import DPMSolverMultistepInverseScheduler as DPMSolverMultistepInverseScheduler
from .dpm import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
from .dpm import DPMSolverSinglestepScheduler as DPMSolverSinglestepScheduler
from .dpm import SASolverScheduler as SASolverScheduler
from .dpm import UniPCMultistepScheduler as UniPCMultistepScheduler
from .inpainting import RePaintScheduler as RePaintScheduler
from .names import AysSchedules as AysSchedules
from .names import scheduler as scheduler
from .score import KarrasVeScheduler as KarrasVeScheduler
from .score import ScoreSdeVeScheduler as ScoreSdeVeScheduler
from .score import ScoreSdeVpScheduler as ScoreSdeVpScheduler
from .sigma import DPMSolver2SAncestralScheduler as DPMSolver2SAncestralScheduler
from .sigma import DPMSolverFastScheduler as DPMSolverFastScheduler
from .sigma import DPMSolverSDEScheduler as DPMSolverSDEScheduler
from .sigma import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
from .sigma import EulerDiscreteScheduler as EulerDiscreteScheduler
from .sigma import HeunDiscreteScheduler as HeunDiscreteScheduler
from .sigma import KDPM2AncestralDiscreteScheduler as KDPM2AncestralDiscreteScheduler
from .sigma import KDPM2DiscreteScheduler as KDPM2DiscreteScheduler
from .sigma import LMSDiscreteScheduler as LMSDiscreteScheduler
from .tables import Plan as Plan
from .tables import SchedulerState as SchedulerState
from .tables import denoised as denoised
from .tables import image_keys as image_keys
from .tables import init as init
from .tables import step as step
from .tokens import AmusedScheduler as AmusedScheduler
from .tokens import VQDiffusionScheduler as VQDiffusionScheduler
