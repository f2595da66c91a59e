"""Draws that follow solve rates, through a whole run: learnt at a publish, of what was trained on and of what was filtered, kept by a
checkpoint."""

from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from tests.run.stage import FakeGenerator, Stage
from vtriune.config.sections.data import SolveRate
from vtriune.config.tree import Policy
from vtriune.messages import GroupReport, Lease
from vtriune.record.checkpoint import latest_complete
from vtriune.roles import Generator
from vtriune.run.snapshots import read_state

SOLVED = range(10)
"""Rows of 40 that every completion answers right."""


def stage(folder: Path, *, steps: int) -> Stage:
    """A run that draws by solve rate over 40 rows, 8 a version."""
    policy = Policy(mode="on_policy", rollout_batch=8, group_size=2)
    made = Stage(folder, policy, steps=steps, num_rows=40, num_generators=2)
    data = msgspec.structs.replace(made.config.data, draw="solve_rate", solve_rate=SolveRate(floor=0.01))
    made.config = msgspec.structs.replace(made.config, data=data)
    made.equal_rewards = lambda lease: lease.sample.row in SOLVED
    return made


@pytest.fixture(autouse=True)
def solve_rates() -> object:
    """What the verifiers would report: 1 for what is solved, ½ elsewhere."""
    generate = FakeGenerator.generate

    async def with_rate(self: FakeGenerator, lease: Lease, others: list[Generator]) -> GroupReport:
        report = await generate(self, lease, others)
        return msgspec.structs.replace(report, solve_rate=1.0 if lease.sample.row in SOLVED else 0.5)

    with patch.object(FakeGenerator, "generate", with_rate):
        yield


async def test_what_is_solved_is_seldom_drawn_again_and_the_line_says_how_many_are(tmp_path: Path) -> None:
    made = stage(tmp_path, steps=20)
    await (await made.open()).run()
    rows = [lease.sample.row for lease in made.leases]
    assert sorted(rows[:40]) == list(range(40))
    later = [row for row in rows[48:] if row in SOLVED]
    assert len(later) < 5, "each is drawn once in a hundred passes"
    assert made.records[-1].metrics["draw/rows_known"] == 40
    assert made.records[-1].metrics["draw/rows_too_easy"] == len(SOLVED)
    assert {lease.sample.probability for lease in made.leases if lease.sample.row not in SOLVED} == {1.0}


async def test_a_run_that_is_resumed_draws_what_one_without_a_stop_draws(tmp_path: Path) -> None:
    whole = stage(tmp_path / "whole", steps=12)
    await (await whole.open()).run()
    first = stage(tmp_path / "first", steps=12)
    await first.stopped_at(6)
    checkpoint = latest_complete(first.folder / "checkpoints")
    assert checkpoint is not None
    assert read_state(checkpoint).cursor["solve_rates"]
    controller = await first.open()
    await controller.resume(checkpoint)
    await controller.run()
    consumed = [{lease.group_id: lease.sample.row for lease in made.leases} for made in (whole, first)]
    assert consumed[0] == consumed[1]
