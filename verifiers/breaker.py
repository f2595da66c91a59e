"""Stops a run whose verifier has broken: too many faults of one source among its latest verdicts.

A fault is masked, so a verifier that always faults would silently train on nothing.
"""

from __future__ import annotations

from collections import deque

from verifiers.types import RewardSpec, Verdict

SHOWN_CHARS = 1_000


class FaultRateError(RuntimeError):
    """A source's fault rate passed its limit. The message shows a sample: source, verifier, reason, gold and response."""

    def __init__(self, source: str, rate: float, num_verdicts: int, sample: str) -> None:
        self.source, self.rate = source, rate
        super().__init__(
            f"{rate:.0%} of the last {num_verdicts} verdicts of source {source!r} are faults. One of them:\n{sample}\n"
            "Look at the reason: a gold answer that cannot be read is to be fixed in the data; a timeout by a larger "
            "rewards.deadline_s; anything else in the verifier."
        )


class CircuitBreaker:
    """Per source, the outcomes of the latest `window` verdicts; opens above `fault_limit` once `min_verdicts` are in."""

    def __init__(self, fault_limit: float, window: int = 256, min_verdicts: int = 64) -> None:
        self._fault_limit, self._window, self._min_verdicts = fault_limit, window, min_verdicts
        self._faults: dict[str, deque[bool]] = {}
        self._samples: dict[str, str] = {}

    def record(self, source: str, spec: RewardSpec, response: str, verdict: Verdict) -> None:
        """Note one verdict."""
        is_fault = verdict.status == "fault"
        self._faults.setdefault(source, deque(maxlen=self._window)).append(is_fault)
        if is_fault:
            self._samples[source] = (
                f"  verifier: {spec.verifier}\n  reason: {verdict.reason[:SHOWN_CHARS]}\n"
                f"  gold: {spec.gold[:SHOWN_CHARS]!r}\n  response: {response[-SHOWN_CHARS:]!r}"
            )

    def fault_rate(self, source: str) -> float:
        """The share of faults among the latest verdicts of a source; 0 for an unknown one."""
        latest = self._faults.get(source)
        return sum(latest) / len(latest) if latest else 0.0

    def check(self, source: str) -> None:
        """FaultRateError where the source's rate is over the limit."""
        latest = self._faults.get(source, ())
        rate = self.fault_rate(source)
        if len(latest) >= self._min_verdicts and rate > self._fault_limit:
            raise FaultRateError(source, rate, len(latest), self._samples[source])
