"""Which faults are drawn, and that wrong books are found."""

from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from bench.faults import KINDS, ROLES, audit, draw
from tests.record.groups import scored, verdict
from vtriune.messages import SampleRef
from vtriune.record import archive
from vtriune.record.archive import Archived
from vtriune.record.checkpoint import commit, stage
from vtriune.run.ledger import Ledger
from vtriune.run.snapshots import STATE_FILE, RunState


@given(st.integers(0, 60), st.integers(1, 500), st.integers(0, 5))
def test_faults_come_in_order_and_while_the_run_goes_on(num_faults: int, num_versions: int, seed: int) -> None:
    faults = draw(num_faults, num_versions, seed)
    times = [fault.due_at for fault in faults]
    assert len(faults) == num_faults
    assert times == sorted(times)
    assert all(1.0 <= due_at <= max(num_versions - 1.5, 1.0) for due_at in times)
    assert {fault.kind for fault in faults} <= set(KINDS)
    assert {fault.role for fault in faults} <= set(ROLES)
    assert faults == draw(num_faults, num_versions, seed)


def run_of(folder: Path, num_consumed: int) -> Path:
    """A finished run of three groups of one completion, of which `num_consumed` are in the archive."""
    ledger = Ledger()
    for row in range(3):
        group = ledger.admit(SampleRef("rows", row), "rows", 0)
        ledger.lease(group.group_id, 1.0)
        ledger.report(group.group_id, 0)
        ledger.consume([group.group_id])
    staging = stage(folder / "checkpoints", 1)
    (staging / STATE_FILE).write_bytes(msgspec.json.encode(RunState(1, 1, ledger.state(), {}, [], 9)))
    commit(staging)
    groups = [Archived(0, scored([verdict(1.0)], group_id=number)) for number in range(num_consumed)]
    archive.write(folder / "rollouts", "version", 1, groups)
    return folder


def test_books_that_agree_pass_and_a_missing_group_is_found(tmp_path: Path) -> None:
    books, wrong = audit(run_of(tmp_path / "right", 3), 1)
    assert (books["admitted"], books["consumed"], books["archived"], books["open"]) == (3, 3, 3, 0)
    assert wrong == []
    assert audit(run_of(tmp_path / "short", 2), 1)[1] == ["3 groups were consumed, 2 are in the archive"]
    assert audit(run_of(tmp_path / "halved", 3), 2)[1][0] == "group 0: 1 completions archived, not 2"
    assert audit(tmp_path / "nothing", 1)[1] == ["the run left no complete checkpoint"]
