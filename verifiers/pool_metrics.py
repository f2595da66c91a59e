"""The pool's figures: verdicts and latencies per verifier and per source, as flat keys for metrics.jsonl."""

from __future__ import annotations

import time
from collections import deque

from verifiers.types import Verdict

KEPT_LATENCIES = 4_096


class _Series:
    """Counts of one verifier or source, and its latest latencies."""

    def __init__(self) -> None:
        self.counts = {"ok": 0, "bad_answer": 0, "fault": 0}
        self.latencies_s: deque[float] = deque(maxlen=KEPT_LATENCIES)


class PoolMetrics:
    """Counters since the pool started; rates over the same time."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._series: dict[str, _Series] = {}
        self.num_restarts = 0
        self.num_retries = 0
        self.num_cached = 0
        self.num_in_front = 0
        self.num_by_workers = 0

    def record(self, verifier: str, source: str, verdict: Verdict, latency_s: float) -> None:
        """Note one verdict, `latency_s` after the pool was asked for it."""
        for key in (f"verifier/{verifier}", f"source/{source}"):
            series = self._series.get(key)
            if series is None:
                series = self._series[key] = _Series()
            series.counts[verdict.status] += 1
            series.latencies_s.append(latency_s)

    def snapshot(self) -> dict[str, float]:
        """Flat figures: `pool/…`, `verifier/<name>/…` and `source/<name>/…`; latencies in seconds, rates in samples per
        second.
        """
        age_s = max(time.monotonic() - self._started_s, 1e-9)
        num_samples = sum(
            sum(series.counts.values()) for key, series in self._series.items() if key.startswith("verifier/")
        )
        out = {
            "pool/num_samples": float(num_samples),
            "pool/samples_per_s": num_samples / age_s,
            "pool/num_restarts": float(self.num_restarts),
            "pool/num_retries": float(self.num_retries),
            "pool/num_cached": float(self.num_cached),
            "pool/num_in_front": float(self.num_in_front),
            "pool/num_by_workers": float(self.num_by_workers),
        }
        for key, series in self._series.items():
            total = sum(series.counts.values())
            ordered = sorted(series.latencies_s)
            out[f"{key}/latency_p50_s"] = ordered[len(ordered) // 2]
            out[f"{key}/latency_p99_s"] = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
            out[f"{key}/samples_per_s"] = total / age_s
            for status, count in series.counts.items():
                out[f"{key}/{status}_rate"] = count / total
        return out
