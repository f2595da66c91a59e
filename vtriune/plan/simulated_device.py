"""An accelerator's time without the accelerator: response lengths, a cost model, and an engine's continuous batch over a clock.

Used by `bench.device_time`, where the clock is the machine's, and by `vtriune.plan`, where it is virtual. All times here are
seconds of the device that is modelled.

An engine decodes one token of every running sequence per step; a step over b sequences takes t(b) = base + b·per_sequence.
Between two events (a sequence ends, starts, or the engine pauses) b is constant, so `Decoder` moves a step counter K(now) in
closed form instead of looping over steps: sequence i, started at K_i, ends when K = K_i + length_i. A group's prompt is
prefilled once and stalls the whole engine meanwhile.
"""

import functools
import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

_BLOCK_GROUPS = 256


@functools.lru_cache(maxsize=64)
def _normals(seed: int, block: int, num_columns: int) -> np.ndarray:
    """float64 (256, num_columns): standard normals of 256 groups at once, which is much faster than group by group."""
    return np.random.default_rng((seed, block)).standard_normal((_BLOCK_GROUPS, num_columns))


class Lengths(msgspec.Struct, frozen=True):
    """Response lengths: log-normal, cut at `cap` tokens as the engine's limit does."""

    median: float = 400.0
    sigma: float = 0.9
    cap: int = 2048
    group_share: float = 0.5
    """Share of the log-variance that the completions of one prompt have in common."""

    def draw(self, seed: int, group_id: int, num_completions: int) -> np.ndarray:
        """int64 (num_completions,) lengths of a group; the same for the same arguments, whoever asks."""
        block, place = divmod(group_id, _BLOCK_GROUPS)
        normal = _normals(seed, block, num_completions + 1)[place]
        mixed = math.sqrt(self.group_share) * normal[0] + math.sqrt(1 - self.group_share) * normal[1:]
        lengths: np.ndarray = np.clip(np.rint(self.median * np.exp(self.sigma * mixed)), 1, self.cap).astype(np.int64)
        return lengths

    @property
    def mean(self) -> float:
        """E[min(X, cap)] of the log-normal X, before rounding: median·e^{σ²/2}·Φ((ln c − σ²)/σ) + cap·(1 − Φ(ln c/σ)),
        with c = cap/median."""
        if self.sigma == 0:
            return min(self.median, self.cap)
        z = math.log(self.cap / self.median) / self.sigma
        below = self.median * math.exp(self.sigma**2 / 2) * _normal_cdf(z - self.sigma)
        return below + self.cap * (1 - _normal_cdf(z))


class Costs(msgspec.Struct, frozen=True):
    """What the device takes, in seconds. Defaults are declared, not measured: roofline arithmetic of a 7B model in bfloat16 on an
    H100 (15 GB of weights read per step at about 2 TB/s; per sequence its share of compute and 1k tokens of key-value cache; 1k prompt
    tokens, image included, at 400 TFLOP/s; 15 GB over a 400 Gbit/s fabric with its set-up)."""

    decode_base_s: float = 0.0075
    decode_per_sequence_s: float = 0.00004
    prefill_s: float = 0.04
    """Per group: its prompt is shared by its completions."""
    publish_s: float = 0.5
    """Learner and engines are both busy with it."""
    verify_s: float = 0.05
    """Virtual clock only: from a group's last token to its report. On real processes the real verifiers take their own time."""

    def step_s(self, num_sequences: int) -> float:
        """t(b)."""
        return self.decode_base_s + num_sequences * self.decode_per_sequence_s


@dataclass(slots=True)
class SimulatedCompletion:
    """One sequence on an engine."""

    group_id: int
    index: int
    length: int
    is_first: bool = False
    """Carries its group's prefill."""
    started_at_step: float = 0.0
    first_version: int = -1
    """Of the policy that sampled its first token."""


class Finished(msgspec.Struct, frozen=True):
    """A completion that has ended, when, and which versions sampled how many of its tokens, oldest first."""

    completion: SimulatedCompletion
    at_s: float
    spans: list[tuple[int, int]]


@dataclass(slots=True)
class Decoder:
    """The continuous batch of one engine. Every method takes the present time; it must not decrease."""

    costs: Costs
    max_sequences: int
    now_s: float = 0.0
    version: int = 0
    steps: float = 0.0
    """K: decode steps done since the start."""
    busy_s: float = 0.0
    """Time with at least one running sequence, pauses excluded."""
    num_tokens: int = 0
    waiting: deque[SimulatedCompletion] = field(default_factory=deque)
    _running: list[tuple[float, int, SimulatedCompletion]] = field(default_factory=list)
    """Heap of (K at the end, tie-break, completion)."""
    _num_started: int = 0
    _stall_s: float = 0.0
    """Prefill still to be done before the next step."""
    _is_paused: bool = False
    _publishes: list[tuple[float, int]] = field(default_factory=list)
    """(K, version) of every publish received, oldest first."""

    @property
    def num_running(self) -> int:
        """b."""
        return len(self._running)

    def submit(self, completions: Sequence[SimulatedCompletion], now_s: float) -> list[Finished]:
        """Queue completions; starts what there is room for. Returns what ended before `now_s`, as `advance` does."""
        finished = self.advance(now_s)
        self.waiting.extend(completions)
        self._start_waiting()
        return finished

    def advance(self, now_s: float) -> list[Finished]:
        """Decode until `now_s`; returns what ended on the way, in order."""
        return list(self._ended_until(now_s))

    def next_end_s(self) -> float:
        """When the next sequence ends if nothing else happens; infinity while paused or idle."""
        if self._is_paused or not self._running:
            return math.inf
        return self.now_s + self._stall_s + (self._running[0][0] - self.steps) * self.costs.step_s(len(self._running))

    def pause(self, now_s: float) -> list[Finished]:
        """Stop decoding, in-flight sequences kept. Returns as `advance`."""
        finished = self.advance(now_s)
        self._is_paused = True
        return finished

    def resume(self, version: int, now_s: float) -> None:
        """Go on with new weights: whatever is sampled from here on carries `version`."""
        self.now_s = max(self.now_s, now_s)
        self._is_paused = False
        self.version = version
        self._publishes.append((self.steps, version))
        self._start_waiting()

    def _ended_until(self, now_s: float) -> Iterator[Finished]:
        while not self._is_paused and self._running:
            end_s = self.next_end_s()
            if end_s > now_s:
                break
            self._pass(end_s)
            end_step, _, completion = heapq.heappop(self._running)
            self.steps = end_step
            self.num_tokens += completion.length
            yield Finished(completion, end_s, self._spans(completion))
            self._start_waiting()
        self._pass(now_s)

    def _pass(self, now_s: float) -> None:
        """Let time pass within which no sequence ends or starts."""
        elapsed_s = now_s - self.now_s
        self.now_s = now_s
        if self._is_paused or not self._running or elapsed_s <= 0:
            return
        self.busy_s += elapsed_s
        stalled_s = min(elapsed_s, self._stall_s)
        self._stall_s -= stalled_s
        self.steps += (elapsed_s - stalled_s) / self.costs.step_s(len(self._running))

    def _start_waiting(self) -> None:
        while self.waiting and len(self._running) < self.max_sequences and not self._is_paused:
            completion = self.waiting.popleft()
            completion.started_at_step, completion.first_version = self.steps, self.version
            self._num_started += 1
            self._stall_s += self.costs.prefill_s * completion.is_first
            heapq.heappush(self._running, (self.steps + completion.length, self._num_started, completion))

    def _spans(self, completion: SimulatedCompletion) -> list[tuple[int, int]]:
        """A token belongs to the version in force when its step ended; a token cut by a publish is sampled after it."""
        spans, version, num_spanned = [], completion.first_version, 0
        # The few latest publishes are those after the start; older ones end the walk.
        later = []
        for step, new_version in reversed(self._publishes):
            if step < completion.started_at_step or new_version == completion.first_version:
                break
            later.append((step, new_version))
        for step, new_version in reversed(later):
            num_before = min(completion.length, math.floor(step - completion.started_at_step + 1e-6))
            if num_before > num_spanned:
                spans.append((version, num_before - num_spanned))
                num_spanned = num_before
            version = new_version
        if completion.length > num_spanned:
            spans.append((version, completion.length - num_spanned))
        return spans


def _normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))
