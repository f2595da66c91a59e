"""The pool's actor with real verifiers: what it scores with which options, whom it delivers to, what it reports."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from actors.verifier_pool import VerifierPoolActor
from tests.actors.worlds import settings
from tests.data.rows import DETECTION_PARM, row, write_parquet
from verifiers import ImageSize
from vtriune.data.build import build_store
from vtriune.data.store import Store
from vtriune.messages import Group, Lease, Sampling, ScoredGroup, Trajectory, VersionSpan
from vtriune.runtime import Actor, endpoint, this_host

WAIT_S = 120.0
MATHS, BOXES, NORMALISED = 0, 1, 2
GOLD_BOX = "[{'bbox_2d': [0, 0, 100, 10], 'label': 'cat'}]"
TRAINING_BOX = "<answer>[{'bbox_2d': [0, 0, 80, 10], 'label': 'cat'}]</answer>"
"""IoU 0.8: a match at 0.5, none at training's 0.95."""


class Sink(Actor):
    """Learner rank or recorder: keeps what it is given."""

    def __init__(self) -> None:
        self.groups: list[ScoredGroup] = []

    @endpoint
    async def deliver(self, scored: ScoredGroup) -> None:
        self.groups.append(scored)

    @endpoint
    async def record_group(self, group: ScoredGroup) -> None:
        await asyncio.sleep(0.05)
        self.groups.append(group)

    @endpoint
    async def take(self) -> list[ScoredGroup]:
        groups, self.groups = self.groups, []
        return groups


class Stage(NamedTuple):
    pool: Any
    learner: Any
    recorder: Any
    store: Store

    async def score(self, number: int, responses: list[str], purpose: str = "train", **lease: Any) -> Any:
        return await self.pool.score.call_one(group(self.store, number, responses, purpose, **lease))

    async def taken(self) -> tuple[list[list[ScoredGroup]], list[ScoredGroup]]:
        """(each learner rank's, the recorder's) since the last time."""
        ranks = [value for _, value in (await self.learner.take.call()).items()]
        return ranks, await self.recorder.take.call_one()


def group(
    store: Store,
    row: int,
    responses: list[str],
    purpose: str = "train",
    *,
    group_id: int = 7,
    progress: float | None = 0.2,
    image_sizes: Sequence[ImageSize] = (),
) -> Group:
    header = store.header(row)
    lease = Lease(group_id, 1, store.ref(row), header, len(responses), Sampling(), purpose, progress)  # type: ignore[arg-type]
    trajectories = [
        Trajectory(
            np.arange(2 + index, dtype=np.int32),
            np.zeros(2 + index, np.float32),
            [VersionSpan(3, 1), VersionSpan(4, 1 + index)],
            "stop",
            text,
        )
        for index, text in enumerate(responses)
    ]
    return Group(lease, np.arange(5, dtype=np.int32), trajectories, 2, 1.5, list(image_sizes))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("rewards")
    boxes = row(1, "boxes", verifier="detection", ground_truth=GOLD_BOX, answer=GOLD_BOX, verifier_parm=DETECTION_PARM)
    parm = DETECTION_PARM | {"det_verifier_normalized": True}
    normalised = row(2, "boxes", verifier="detection", ground_truth=GOLD_BOX, answer=GOLD_BOX, verifier_parm=parm)
    rows = [row(0, "maths"), boxes, normalised]
    store = build_store([write_parquet(folder / "rows.parquet", rows)], folder / "store")
    config = settings(folder, rewards={"evaluation_threshold": 0.5, "deadline_s": 20.0})
    meshes = [
        this_host().spawn_procs({"procs": n}, name=name, on_failure=print) for name, n in (("ranks", 2), ("rest", 1))
    ]
    learner, recorder = meshes[0].spawn("learner", Sink), meshes[1].spawn("recorder", Sink)
    pool = meshes[1].spawn("pool", VerifierPoolActor, config, learner, recorder)
    pool.ready.call().get(timeout=WAIT_S)
    yield Stage(pool, learner, recorder, store)
    for mesh in meshes:
        mesh.stop().get(timeout=WAIT_S)


async def test_a_training_group_reaches_every_learner_rank_and_the_recorder_before_its_report(stage: Stage) -> None:
    right, wrong = "<think>0</think><answer>\\boxed{0}</answer>", "\\boxed{1}"
    report = await stage.score(MATHS, [right, wrong])
    ranks, recorded = await stage.taken()
    assert [len(groups) for groups in ranks] == [1, 1]
    (scored,) = recorded
    assert [verdict.reward for verdict in scored.verdicts] == [1.0, 0.0] == report.rewards
    assert (scored.source, [t.text for t in scored.group.trajectories]) == ("maths", [right, wrong])
    assert [t.text for groups in ranks for t in groups[0].group.trajectories] == [""] * 4, (
        "the learner has no use for texts"
    )
    assert (report.group_id, report.attempt, report.num_tokens, report.num_faults) == (7, 1, 5, 0)
    assert report.verification_s > 0


async def test_an_evaluation_group_reaches_the_recorder_alone_and_is_scored_at_the_evaluation_threshold(
    stage: Stage,
) -> None:
    training = await stage.score(BOXES, [TRAINING_BOX], progress=0.2)
    await stage.taken()
    evaluation = await stage.score(BOXES, [TRAINING_BOX], "evaluate", progress=None)
    ranks, recorded = await stage.taken()
    assert ranks == [[], []]
    assert [scored.group.lease.purpose for scored in recorded] == ["evaluate"]
    assert evaluation.rewards[0] > training.rewards[0]


async def test_boxes_in_the_pixels_that_the_model_saw_are_judged_by_the_groups_sizes(stage: Stage) -> None:
    text = "<answer>[{'bbox_2d': [0, 0, 100, 10], 'label': 'cat'}]</answer>"
    sizes = [ImageSize((800, 600), (1000, 1000))], [ImageSize((800, 600), (700, 500))]
    reports = [await stage.score(NORMALISED, [text], image_sizes=known) for known in sizes]
    await stage.taken()
    assert [report.num_faults for report in reports] == [0, 0]
    assert reports[0].rewards[0] > 0.9 > reports[1].rewards[0]


async def test_groups_scored_side_by_side_keep_their_own_verdicts(stage: Stage) -> None:
    answers = [[f"\\boxed{{{i % 2}}}", f"\\boxed{{{1 - i % 2}}}"] for i in range(12)]
    reports = await asyncio.gather(*(stage.score(MATHS, texts, group_id=i) for i, texts in enumerate(answers)))
    assert [[reward > 0.5 for reward in report.rewards] for report in reports] == [
        [text == "\\boxed{0}" for text in texts] for texts in answers
    ]
    ranks, recorded = await stage.taken()
    assert all(len({scored.group.lease.group_id for scored in groups}) == 12 for groups in (*ranks, recorded))


async def test_metrics_are_of_training_and_evaluation_since_they_were_asked_for(stage: Stage) -> None:
    await stage.pool.metrics.call_one()
    await stage.score(MATHS, ["\\boxed{0}", "\\boxed{1}"])
    await stage.score(BOXES, [TRAINING_BOX], "evaluate")
    figures = await stage.pool.metrics.call_one()
    numbers = {
        name: figures[name] for name in figures if name.endswith("/num_samples") and not name.startswith("source/")
    }
    assert numbers == {
        "pool/num_samples": 3.0,
        "verifier/mathverify/num_samples": 2.0,
        "verifier/detection/num_samples": 1.0,
    }
    assert (await stage.pool.metrics.call_one())["pool/num_samples"] == 0.0
