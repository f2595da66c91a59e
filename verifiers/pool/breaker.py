"""Stops a run whose verifier has broken: too many faults of one source among its latest verdicts.

A fault is masked, so a verifier that always faults would silently train on nothing.
"""

from collections import defaultdict, deque

from verifiers.types import RewardSpec, Verdict

WINDOW, MIN_VERDICTS = 256, 64
SHOWN_CHARS = 1_000


class FaultRateError(RuntimeError):
    """A source's fault rate passed its limit. The message shows a sample: source, verifier, reason, gold and response."""

    kind = "fatal"
    """Ends the run that the pool scores for."""

    def __init__(self, source: str, rate: float, num_verdicts: int, sample: str) -> None:
        super().__init__(
            f"{rate:.0%} of the last {num_verdicts} verdicts of source {source!r} are faults. One of them:\n{sample}\n"
            "Look at the reason: a gold answer that cannot be read is to be fixed in the data; a timeout by a larger "
            "rewards.deadline_s; anything else in the verifier."
        )


class CircuitBreaker:
    """Per source, whether its latest WINDOW verdicts were faults; opens above `fault_limit` once MIN_VERDICTS are in."""

    def __init__(self, fault_limit: float) -> None:
        self._fault_limit = fault_limit
        self._faults: defaultdict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._samples: dict[str, str] = {}

    def record(self, source: str, spec: RewardSpec, response: str, verdict: Verdict) -> None:
        """Note one verdict."""
        is_fault = verdict.status == "fault"
        self._faults[source].append(is_fault)
        if is_fault:
            self._samples[source] = (
                f"  verifier: {spec.verifier}\n  reason: {verdict.reason[:SHOWN_CHARS]}\n"
                f"  gold: {spec.gold[:SHOWN_CHARS]!r}\n  response: {response[-SHOWN_CHARS:]!r}"
            )

    def check(self, source: str) -> None:
        """FaultRateError where the source's rate is over the limit."""
        latest = self._faults[source]
        if len(latest) >= MIN_VERDICTS and (rate := sum(latest) / len(latest)) > self._fault_limit:
            raise FaultRateError(source, rate, len(latest), self._samples[source])
