from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.jobs import Job


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts jobs over one run folder; none outlives the test."""
    jobs: list[Job] = []

    def start_one(*overrides: str, **options: Any) -> Job:
        jobs.append(Job(tmp_path, *overrides, **options))
        return jobs[-1]

    yield start_one
    for job in jobs:
        job.end()
