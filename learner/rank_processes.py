"""The learner's ranks in processes of this machine, without a run around them. Called by `learner.replay`."""

from learner.actor import LearnerActor
from vtriune.config import Config
from vtriune.messages import ScoredGroup, TrainOrder, TrainReport
from vtriune.runtime import interface_of, this_host


class RankProcesses:
    """The ranks of `config` in processes of this machine, called as one `LearnerRank` is. Errors carry the rank's traceback."""

    def __init__(self, config: Config, store_folders: list[str]) -> None:
        section = config.cluster.learner
        # As the run starts them: threads that OpenMP makes for a process are counted before any of our code says how many.
        env = {"OMP_NUM_THREADS": str(section.threads), "MKL_NUM_THREADS": str(section.threads)}
        self._procs = this_host().spawn_procs({"procs": section.procs}, name="learner", env=env)
        self._ranks = self._procs.spawn("learner", LearnerActor, config, store_folders)

    def open_store(self) -> int:
        return self._ranks.slice(procs=0).open_store.call_one().get()

    def connect(self, _: str, port: int) -> None:
        self._ranks.connect.call(interface_of(self._procs.peers[0]), port).get()

    def deliver(self, scored: ScoredGroup) -> None:
        self._ranks.deliver.call(scored).get()

    def train(self, order: TrainOrder) -> TrainReport:
        return self._ranks.train.call(order).get().rank_value(0)

    def save(self, folder: str) -> None:
        self._ranks.save.call(folder).get()

    def saved(self) -> None:
        self._ranks.saved.call().get()

    def load(self, folder: str) -> None:
        self._ranks.load.call(folder).get()

    def close(self) -> None:
        self._procs.stop().get()
