"""The tree of frozen structs behind every configuration file, put together from `vtriune.config.sections`. Read by every process."""

from vtriune.config.sections.alarms import Alarms
from vtriune.config.sections.checkpoint import Checkpoint
from vtriune.config.sections.cluster import Cluster, Generators, Learner, Placement, Verifiers
from vtriune.config.sections.data import Data
from vtriune.config.sections.evaluation import Evaluation
from vtriune.config.sections.loss import Loss
from vtriune.config.sections.model import Model, Module
from vtriune.config.sections.optimizer import Optimizer
from vtriune.config.sections.policy import Phase, Policy
from vtriune.config.sections.record import Record
from vtriune.config.sections.rewards import Rewards
from vtriune.config.sections.run import Run
from vtriune.config.sections.sampling import SamplingSection
from vtriune.config.sections.section import Mode, Section
from vtriune.config.sections.tracking import Tracking

__all__ = [
    "Alarms", "Checkpoint", "Cluster", "Config", "Data", "Evaluation", "Generators", "Learner", "Loss", "Mode", "Model", "Module",
    "Optimizer", "Phase", "Placement", "Policy", "Record", "Rewards", "Run", "SamplingSection", "Section", "Tracking", "Verifiers",
]  # fmt: skip


class Config(Section, frozen=True):
    """One training run."""

    run: Run = Run()
    cluster: Cluster = Cluster()
    model: Model = Model()
    data: Data = Data()
    policy: Policy = Policy()
    sampling: SamplingSection = SamplingSection()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    rewards: Rewards = Rewards()
    evaluation: Evaluation = Evaluation()
    record: Record = Record()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    alarms: Alarms = Alarms()
