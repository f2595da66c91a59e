"""A replay gives the learner the archived groups in the order of the run, with the controller's orders."""

import json
from pathlib import Path

import numpy as np
import pytest

from learner.replay import ReplayError, main, read_run, store_folders
from tests.learner import worlds
from vtriune.data import archive
from vtriune.data.archive import Archived


def a_run(folder: Path, num_versions: int = 3) -> list[list[int]]:
    """An archive of versions with four groups each, the second version off-policy; returns the group ids of each."""
    world, rng = worlds.World(), np.random.default_rng(0)
    ids: list[list[int]] = []
    lines = []
    for version in range(1, num_versions + 1):
        groups = worlds.random_groups(world, rng, 4, images="none")
        renamed = []
        for index, group in enumerate(groups):
            group_id = 10 * version + (3 - index)
            responses = [t.token_ids for t in group.group.trajectories]
            rewards = [v.reward for v in group.verdicts]
            sampler = max(0, version - 2) if version == 2 else version - 1
            renamed.append(worlds.scored_group(group_id, group.group.prompt_ids, responses, rewards, version=sampler))
        archive.write(folder / "rollouts", "version", version, (Archived(version - 1, group) for group in renamed))
        ids.append([group.group.lease.group_id for group in renamed])
        lines.append(json.dumps({"version": version, "policy/is_off_policy": float(version == 2)}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return ids


def test_versions_come_in_order_with_the_controllers_updates_and_corrections(tmp_path: Path) -> None:
    ids = a_run(tmp_path)
    config = worlds.config_with(run={"steps": 5}, policy={"mode": "off_policy", "rollout_batch": 4, "update_batch": 2})
    batches = list(read_run(config, tmp_path))
    assert [[g.group.lease.group_id for g in batch.groups] for batch in batches] == ids
    assert [batch.order.updates for batch in batches] == [[i[:2], i[2:]] for i in ids]
    assert [batch.order.version for batch in batches] == [0, 1, 2]
    assert [batch.order.correction for batch in batches] == ["none", "decoupled", "none"]
    assert [batch.order.max_staleness for batch in batches] == [0, 1, 0]
    assert [batch.order.first_update for batch in batches] == [0, 2, 4]
    assert {batch.order.num_updates_total for batch in batches} == {10}


def test_a_run_without_archive_with_a_gap_or_without_stores_is_refused_by_name(tmp_path: Path) -> None:
    config = worlds.config_with(run={"steps": 3}, data={"store": str(tmp_path / "stores")})
    with pytest.raises(ReplayError, match="no archived version"):
        list(read_run(config, tmp_path))
    a_run(tmp_path)
    (tmp_path / "rollouts" / "version-000002.parquet").unlink()
    with pytest.raises(ReplayError, match=r"version-000003.*expected version 2"):
        list(read_run(config, tmp_path))
    with pytest.raises(ReplayError, match="no store of samples"):
        store_folders(config)


def test_the_command_line_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
