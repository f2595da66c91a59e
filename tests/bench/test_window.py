"""The soak of the window finds what it is there to find, and finds nothing in the window itself."""

import pytest

from bench import window as soak
from vtriune.window import Window


def test_three_hundred_random_runs_keep_every_promise() -> None:
    counts = soak.soak(300)
    assert counts["sequences"] == 300
    assert min(counts[name] for name in ("short batches", "resumes", "switches", "leases lost", "filtered")) > 0
    assert counts["slowest group consumed"] > 0


class Lossy(Window):
    """Forgets the last group of every full batch."""

    def cut(self) -> list[int] | None:
        batch = super().cut()
        return batch[:-1] if batch else batch


class Hasty(Window):
    """Cuts without looking whether the rest can still be consumed in time."""

    def _is_feasible(self, rest: object, next_version: int) -> bool:
        return True


@pytest.mark.parametrize("broken", [Lossy, Hasty])
def test_a_window_that_breaks_a_promise_is_caught(broken: type[Window], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "Window", broken)
    with pytest.raises(soak.PromiseBroken, match=r"sequence \d+"):
        soak.soak(2000)
