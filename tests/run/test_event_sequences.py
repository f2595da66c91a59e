"""The soak of the window finds what it is there to find, and finds nothing in the window itself."""

from collections.abc import Mapping, Sequence

import pytest

from tests.run import event_sequences as soak
from vtriune.run.window import Window


def test_three_hundred_random_runs_keep_every_promise() -> None:
    counts = soak.soak(300)
    assert counts["sequences"] == 300
    assert min(counts[name] for name in ("short batches", "resumes", "switches", "leases lost", "filtered")) > 0
    assert counts["slowest group consumed"] > 0


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_random_runs_keep_every_promise() -> None:
    assert soak.soak(100_000)["sequences"] == 100_000


class Lossy(Window):
    """Forgets the last group of every full batch."""

    def cut(self) -> list[int] | None:
        batch = super().cut()
        return batch[:-1] if batch else batch


class Hasty(Window):
    """Cuts without looking whether the rest can still be consumed in time."""

    def _is_feasible(self, rest: object) -> bool:
        return True


class Lavish(Window):
    """Replaces filtered groups without end."""

    def _size(self, batch: int) -> int:
        return self.rollout_batch


class Crowded(Window):
    """Gives every restored group a slot, whatever the rollout batch has become."""

    def restore(self, version: int, bounds: Mapping[int, int], filtered: Sequence[int]) -> None:
        super().restore(version, dict.fromkeys(bounds, len(bounds) + len(filtered)), filtered)
        for group_id, entry in self._waiting.items():
            entry.max_staleness = bounds[group_id]


@pytest.mark.parametrize("broken", [Lossy, Hasty, Lavish, Crowded])
def test_a_window_that_breaks_a_promise_is_caught(broken: type[Window], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "Window", broken)
    with pytest.raises(soak.PromiseBroken, match=r"sequence \d+"):
        soak.soak(2000)
