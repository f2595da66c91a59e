"""The order of the suite: what takes minutes begins first, so that no worker is left alone with it at the end; which signals the
processes under test are born with; who listens to steps."""

import signal
from pathlib import Path

import pytest

from vtriune.runtime import steps

LONGEST_FIRST = ["system/test_run.py", "system/test_ray.py", "learner/test_options.py"]


def pytest_configure() -> None:
    """A shell that starts the suite in the background has it ignore SIGINT, and nohup SIGHUP. Whoever is started by it would inherit
    that, and tests of these signals would fail; a handler is not inherited."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every step that this process tells of from now on: its work and its words."""
    found: list[tuple[str, str]] = []
    monkeypatch.setattr(steps, "_note", lambda who, work, step, within_s: found.append((work, step)))
    return found
