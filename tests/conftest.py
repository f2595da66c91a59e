"""The order of the suite: what takes minutes begins first, so that no worker is left alone with it at the end."""

from pathlib import Path

import pytest

LONGEST_FIRST = ["system/test_run.py", "system/test_ray.py", "checkpoint/test_kills.py", "learner/test_options.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
