"""The pool's figures: verdicts and latencies per verifier and per source, as flat keys for metrics.jsonl."""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence

from verifiers.types import Verdict

KEPT_LATENCIES = 4_096
COUNTS = ("num_restarts", "num_retries", "num_cached", "num_in_front", "num_by_workers")


class _Series:
    """Counts of one verifier or source, and its latest latencies."""

    def __init__(self) -> None:
        self.counts = {"ok": 0, "bad_answer": 0, "fault": 0}
        self.latencies_s: deque[float] = deque(maxlen=KEPT_LATENCIES)


class PoolMetrics:
    """Counters since the pool started, or since the last `take`; rates over the same time."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._series: defaultdict[str, _Series] = defaultdict(_Series)
        self.counts: Counter[str] = Counter()
        """By the names of COUNTS."""

    def record(self, verifier: str, source: str, verdict: Verdict, latency_s: float) -> None:
        """Note one verdict, `latency_s` after the pool was asked for it."""
        for key in (f"verifier/{verifier}", f"source/{source}"):
            series = self._series[key]
            series.counts[verdict.status] += 1
            series.latencies_s.append(latency_s)

    def snapshot(self) -> dict[str, float]:
        """Flat figures: `pool/…`, `verifier/<name>/…` and `source/<name>/…`; latencies in seconds, speeds in samples per second."""
        age_s = max(time.monotonic() - self._started_s, 1e-9)
        judged = [series.counts for key, series in self._series.items() if key.startswith("verifier/")]
        num_samples = sum(sum(counts.values()) for counts in judged)
        out = {"pool/num_samples": float(num_samples), "pool/samples_per_s": num_samples / age_s}
        out.update({f"pool/{name}": float(self.counts[name]) for name in COUNTS})
        for key, series in self._series.items():
            total = sum(series.counts.values())
            ordered = sorted(series.latencies_s)
            out[f"{key}/num_samples"] = float(total)
            out[f"{key}/latency_p50_s"] = ordered[len(ordered) // 2]
            out[f"{key}/latency_p99_s"] = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
            out[f"{key}/samples_per_s"] = total / age_s
            for status, count in series.counts.items():
                out[f"{key}/{status}_rate"] = count / total
        return out

    def take(self) -> dict[str, float]:
        """`snapshot`, and begin anew: the next figures are of what comes from now on."""
        figures = self.snapshot()
        self._started_s = time.monotonic()
        self._series.clear()
        self.counts.clear()
        return figures


def merged(pools: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of several pools as one's: counts and speeds add up, shares are weighed by samples, latencies are the slowest's."""
    out: dict[str, float] = {}
    for key in dict.fromkeys(key for figures in pools for key in figures):
        prefix, _, name = key.rpartition("/")
        having = [figures for figures in pools if key in figures]
        if name.startswith("latency_"):
            out[key] = max(figures[key] for figures in having)
        elif name.endswith("_rate"):
            weights = [figures[f"{prefix}/num_samples"] for figures in having]
            pairs = zip(having, weights, strict=True)
            out[key] = sum(figures[key] * weight for figures, weight in pairs) / sum(weights)
        else:
            out[key] = sum(figures[key] for figures in having)
    return out
