"""The ledger: every group from admission to its end, exactly once. Pure logic; the clock is an argument. Called by `Groups`
alone, but for an evaluation, which keeps one of its own over its rows.

    admitted ──lease──▶ leased ──report──▶ scored ──consume──▶ consumed
        ▲                 │  │                ├────────────▶ filtered   (policy.filter)
        │                 │  │                └────────────▶ faulted    (too few verdicts that say anything)
        └── lease lost ───┘  └─────────────────────────────▶ lost       (with a reason, when attempts run out)

A lost lease is issued again with the next attempt number; a report of an older attempt counts as well as one of the
newest, whichever comes first, and every later report of the group is a duplicate. A group that keeps failing is lost soon;
one whose generators die may be innocent, and is tried longer, but not for ever: it may be what they die of. Ended groups are
kept as counts per source and end, open ones whole, so that the ledger stays small over millions of groups.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import msgspec

from vtriune.config.sections.alarms import MAX_WINDOW
from vtriune.messages import SampleRef

State = Literal["admitted", "leased", "scored"]
End = Literal["consumed", "filtered", "faulted", "lost"]

MAX_REASONS = 100
"""Reasons of losses that are kept word by word, since many name their row; the others are counted together as"""
OTHER_REASONS = "other reasons, which the log tells"


class LedgerError(RuntimeError):
    """An event that contradicts the ledger: a fault of the controller's, never of the data."""


class OpenGroup(msgspec.Struct):
    """A group that has not ended."""

    group_id: int
    sample: SampleRef
    source: str
    max_staleness: int
    """The hard bound in force at admission."""
    state: State = "admitted"
    attempt: int = 0
    """Of the lease; once scored, that of the report that counted."""
    num_failures: int = 0
    """Leases lost to an error or a deadline."""
    num_deaths: int = 0
    """Leases lost with their generator."""
    deadline: float | None = None
    """Of the lease, on the caller's clock."""
    solve_rate: float | None = None
    """Once scored: mean accuracy of its completions."""


class Solved(msgspec.Struct, frozen=True, array_like=True):
    """How a group that was consumed or filtered was answered."""

    group_id: int
    row: int
    solve_rate: float
    """Mean accuracy of its completions, in [0, 1]."""


class LedgerState(msgspec.Struct):
    """What a checkpoint keeps."""

    next_id: int
    open_groups: list[OpenGroup]
    ended: dict[str, dict[str, int]]
    lost_reasons: dict[str, int]
    num_duplicates: int
    num_reissues: int
    first_attempt: int = 0
    """Attempts of this start of the run are counted from it: above all that earlier starts delivered and nobody trained on."""
    lost_ids: list[int] = []
    solved: list[Solved] = []
    """Groups that ended since the last publish."""


class Ledger:
    """Book-keeping of one run's groups. Every method is one event; `audit` proves that nothing is missing.

    max_failures, max_deaths   of a group; with either it is lost
    """

    def __init__(self, max_failures: int = 3, max_deaths: int = 12) -> None:
        self.max_failures, self.max_deaths = max_failures, max_deaths
        self.num_duplicates = 0
        self.num_reissues = 0
        self.lost_reasons: Counter[str] = Counter()
        self._next_id = 0
        self._first_attempt = 0
        self._open: dict[int, OpenGroup] = {}
        self._unleased: set[int] = set()
        """Open groups in state `admitted`."""
        self._ended: dict[str, Counter[str]] = {}
        self._lost_ids: deque[int] = deque(maxlen=MAX_WINDOW)
        """Of the groups lost last, in the order of their loss."""
        self._solved: list[Solved] = []

    def admit(self, sample: SampleRef, source: str, max_staleness: int) -> OpenGroup:
        """A new group; ids rise by one."""
        group = OpenGroup(self._next_id, sample, source, max_staleness, attempt=self._first_attempt)
        self._open[group.group_id] = group
        self._unleased.add(group.group_id)
        self._next_id += 1
        return group

    def lease(self, group_id: int, deadline: float) -> int:
        """The group goes to a generator until `deadline`; returns the attempt number."""
        group = self._expect(group_id, "admitted")
        self._unleased.remove(group_id)
        group.state, group.deadline = "leased", deadline
        return group.attempt

    def report(self, group_id: int, attempt: int, solve_rate: float | None = None) -> bool:
        """The group is scored and delivered. False for a duplicate: it is counted and changes nothing.

        The first report counts, of whichever attempt: also while the group waits to be leased again. That attempt is everywhere
        when it is reported, which cannot be said of any other.
        """
        group = self._open.get(group_id)
        if group is None or group.state == "scored":
            if group_id >= self._next_id:
                raise LedgerError(f"group {group_id}: reported, but never admitted")
            self.num_duplicates += 1
            return False
        self._unleased.discard(group_id)
        group.state, group.attempt, group.deadline, group.solve_rate = "scored", attempt, None, solve_rate
        return True

    def lose_lease(self, group_id: int, attempt: int, reason: str, *, is_death: bool = False) -> bool:
        """The lease ended without a report, `is_death` with its generator. The group is to be leased again; or, when that happened
        too often, is lost for good under `reason`, and True returned. An outdated `attempt` changes nothing."""
        group = self._open.get(group_id)
        if group is None or group.state != "leased" or group.attempt != attempt:
            return False
        group.attempt += 1
        group.num_deaths += is_death
        group.num_failures += not is_death
        if group.num_failures >= self.max_failures or group.num_deaths >= self.max_deaths:
            is_told = reason in self.lost_reasons or len(self.lost_reasons) < MAX_REASONS
            self.lost_reasons[reason if is_told else OTHER_REASONS] += 1
            self._end(group_id, "lost")
            return True
        self.num_reissues += 1
        group.state, group.deadline = "admitted", None
        self._unleased.add(group_id)
        return False

    def consume(self, group_ids: Iterable[int]) -> None:
        """The learner trained on these groups."""
        for group_id in group_ids:
            self._expect(group_id, "scored")
            self._end(group_id, "consumed")

    def filter(self, group_id: int) -> None:
        """A scored group that the policy leaves out."""
        self._expect(group_id, "scored")
        self._end(group_id, "filtered")

    def fault(self, group_id: int) -> None:
        """A scored group of which too few verdicts say anything."""
        self._expect(group_id, "scored")
        self._end(group_id, "faulted")

    def take_solved(self) -> list[Solved]:
        """Groups consumed and filtered since the last call, in the order of their ids."""
        solved, self._solved = sorted(self._solved, key=lambda group: group.group_id), []
        return solved

    def get(self, group_id: int) -> OpenGroup:
        """The open group; KeyError once it has ended."""
        return self._open[group_id]

    def overdue(self, now: float) -> list[OpenGroup]:
        """Leases past their deadline."""
        return [g for g in self._open.values() if g.deadline is not None and g.deadline <= now]

    def first_to_lease(self) -> OpenGroup | None:
        """The oldest group without a generator."""
        return self._open[min(self._unleased)] if self._unleased else None

    @property
    def num_open(self) -> int:
        """Groups that have not ended."""
        return len(self._open)

    @property
    def num_to_lease(self) -> int:
        """Groups without a generator."""
        return len(self._unleased)

    def attempts(self, group_ids: Iterable[int]) -> dict[int, int]:
        """Group id → the attempt that counts, of scored groups."""
        return {group_id: self._expect(group_id, "scored").attempt for group_id in group_ids}

    def open_from(self, batch: Iterable[int]) -> int:
        """The smallest id of an open group that is not in `batch`; the next id when there is none."""
        return min(self._open.keys() - set(batch), default=self._next_id)

    def bounds(self) -> dict[int, int]:
        """Group id → hard bound of every open group, oldest first: what the window is restored from."""
        return {g.group_id: g.max_staleness for g in self._open.values()}

    def counts(self) -> dict[str, int]:
        """Number of groups by state and end, over all sources."""
        counts: Counter[str] = Counter(g.state for g in self._open.values())
        for ends in self._ended.values():
            counts.update(ends)
        return {name: counts[name] for name in (*get_args(State), *get_args(End))}

    def ended_by_source(self) -> Mapping[str, Mapping[str, int]]:
        """source → end → number of groups."""
        return self._ended

    def open_by_source(self) -> Mapping[str, int]:
        """source → number of open groups."""
        return Counter(group.source for group in self._open.values())

    @property
    def num_ended(self) -> int:
        """Groups consumed, filtered, faulted or lost: samples accounted for."""
        return sum(sum(ends.values()) for ends in self._ended.values())

    def num_lost_among(self, window: int) -> int:
        """How many of `window` groups, at most MAX_WINDOW, admitted one after the other up to the youngest lost one, are lost.

        In the order of admission, not of their ends: a broken group fails in a moment, long before the whole ones beside it are scored.
        """
        after = max(self._lost_ids, default=0) - window
        return sum(group_id > after for group_id in self._lost_ids)

    def audit(self) -> None:
        """Raise LedgerError unless every admitted group is open or has ended exactly once."""
        num_known = len(self._open) + self.num_ended
        if num_known != self._next_id:
            raise LedgerError(f"{self._next_id} groups were admitted, but {num_known} are accounted for")

    def state(self) -> LedgerState:
        """For a checkpoint."""
        ended = {source: dict(ends) for source, ends in self._ended.items()}
        groups = list(self._open.values())
        return LedgerState(
            self._next_id,
            groups,
            ended,
            dict(self.lost_reasons),
            self.num_duplicates,
            self.num_reissues,
            self._first_attempt,
            list(self._lost_ids),
            list(self._solved),
        )

    def restore(self, state: LedgerState) -> None:
        """Open groups come back as admitted: engines and the learner's queue did not survive. They and those to come have
        attempts from `first_attempt` on, so that an archive tells them from what earlier starts delivered under the same ids."""
        self._next_id, self._first_attempt = state.next_id, state.first_attempt
        self._open = {
            g.group_id: msgspec.structs.replace(
                g, state="admitted", deadline=None, solve_rate=None, attempt=max(g.attempt, self._first_attempt)
            )
            for g in state.open_groups
        }
        self._unleased = set(self._open)
        self._ended = {source: Counter(ends) for source, ends in state.ended.items()}
        self.lost_reasons = Counter(state.lost_reasons)
        self.num_duplicates, self.num_reissues = state.num_duplicates, state.num_reissues
        self._lost_ids = deque(state.lost_ids, maxlen=MAX_WINDOW)
        self._solved = list(state.solved)

    def _expect(self, group_id: int, state: State) -> OpenGroup:
        group = self._open.get(group_id)
        if group is None or group.state != state:
            found = "ended or unknown" if group is None else group.state
            raise LedgerError(f"group {group_id}: expected {state}, it is {found}")
        return group

    def _end(self, group_id: int, end: End) -> None:
        group = self._open.pop(group_id)
        if end == "lost":
            self._lost_ids.append(group_id)
        elif end in ("consumed", "filtered") and group.solve_rate is not None:
            self._solved.append(Solved(group_id, group.sample.row, group.solve_rate))
        self._ended.setdefault(group.source, Counter())[end] += 1
