"""The time between two lines of `metrics.jsonl`: where it went, and rates and shares of it. Used by the controller.

Every numerator and denominator of a line's `time/` and `throughput/` is of the interval that ends when the line is made.
"""

import asyncio
import time
from contextlib import AbstractContextManager

from verifiers.pool.figures import merged
from vtriune import roles
from vtriune.config.tree import Config
from vtriune.run.fleet import FIGURES_S, Fleet
from vtriune.run.leasing import Leasing
from vtriune.run.stopwatch import Part, Stopwatch


class Interval:
    """Since the last line, of the training loop: its owner says what it does by `on`, and takes the figures with each line."""

    def __init__(self, config: Config, fleet: Fleet, leasing: Leasing, verifiers: roles.VerifierPool) -> None:
        self.idle: dict[str, float] = {}
        """Share of the last one that each role waited; without the generators where none was there to say."""
        self._kinds = config.evaluation.sampling
        self._num_verifiers = config.cluster.verifiers.procs
        self._fleet = fleet
        self._leasing = leasing
        self._verifiers = verifiers
        self._times = Stopwatch()

    def on(self, part: Part) -> AbstractContextManager[None]:
        """`Stopwatch.on`."""
        return self._times.on(part)

    def begin(self) -> None:
        """The time of the line to come begins here; what was counted so far is in no line."""
        self._times.take()
        self._fleet.verifying.take_idle_share(time.monotonic())
        self._leasing.take_counts()

    def take(self, metrics: dict[str, float]) -> dict[str, float]:
        """Parts, rates and shares since the line before. `metrics` are those of the line so far; an evaluation's completions are
        counted apart."""
        times = self._times.take()
        step_s = times["time/step_s"]
        completions, tokens = self._leasing.take_counts()
        counts = [
            metrics.get(f"eval/{kind}/{count}", 0.0) for kind in self._kinds for count in ("num_rows", "num_faults")
        ]
        learner_s = sum(times[f"time/{part}_s"] for part in ("train", "publish", "checkpoint"))
        self.idle = {
            "learner": 1.0 - learner_s / step_s,
            "verifiers": self._fleet.verifying.take_idle_share(time.monotonic()),
        }
        if (share := metrics.get("throughput/generators/idle_share")) is not None:
            self.idle["generators"] = share
        return {
            **times,
            "time/unix_s": time.time(),
            "throughput/completions_per_s": completions / step_s,
            "throughput/tokens_per_s": tokens / step_s,
            "throughput/eval_completions_per_s": sum(counts) / step_s,
            "throughput/learner/idle_share": self.idle["learner"],
            "throughput/verifiers/idle_share": self.idle["verifiers"],
        }

    async def verifier_figures(self) -> dict[str, float]:
        """Since the last call, over all processes: `verifiers/num_restarts`, `time/verifiers/<name>/latency_p99_s` and so on."""
        ranks = range(self._num_verifiers)
        calls = (self._verifiers.slice(procs=rank).metrics.within(FIGURES_S).call_one() for rank in ranks)
        with self.on("record"):
            answers = await asyncio.gather(*calls, return_exceptions=True)
        # A process that dies now is replaced, and its figures end with it.
        figures = merged([answer for answer in answers if isinstance(answer, dict)])
        parts = ((name.partition("/"), value) for name, value in figures.items())
        return {f"{_clocked(name)}verifiers/{name}": value for (kind, _, name), value in parts if kind != "source"}


def _clocked(name: str) -> str:
    """What stands before the name of a figure that depends on the clock: two runs that are the same otherwise differ in it."""
    if name.endswith("_per_s"):
        return "throughput/"
    return "time/" if name.endswith("_s") else ""
