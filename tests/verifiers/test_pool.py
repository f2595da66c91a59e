"""The pool under every hostile answer of cases/poison.jsonl: nothing is lost, nobody waits, no process stays behind."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from verifiers import RewardOptions, RewardSpec, score_batch
from verifiers.breaker import FaultRateError
from verifiers.crew import PATIENCE_S, Crew, CrewError
from verifiers.nursery import NurseryDied
from verifiers.pool import VerifierPool
from verifiers.pool_metrics import PoolMetrics
from verifiers.registry import Outcome
from verifiers.wire import Job, Result, Setup

DEADLINE_S = 1.5
HALF = RewardSpec(ground_truth=r"\boxed{\frac{1}{2}}")
MISBEHAVE = "tests.verifiers.user_functions:misbehave"
CUSTOM = RewardSpec(ground_truth="x", verifier="python", verifier_parm={"function": MISBEHAVE})
CAT = "[{'bbox_2d': [0, 0, 10, 10], 'label': 'cat'}]"
DETECTION = RewardSpec(ground_truth=CAT, verifier="detection", verifier_parm={"det_reward_ratio": {"map": 1.0}})
POISON = [json.loads(line) for line in (Path(__file__).parent / "cases" / "poison.jsonl").read_text().splitlines()]
OPTIONS = RewardOptions(python_allow=(MISBEHAVE,))

pytestmark = pytest.mark.asyncio(loop_scope="module")


def descendants() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "verifiers.worker" in " ".join(process.cmdline())]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[VerifierPool]:
    pool = VerifierPool(1, OPTIONS, DEADLINE_S, fault_limit=1.0, memory_limit_bytes=768 * 1024**2)
    await pool.start()
    yield pool
    pids = pool.worker_pids
    await pool.close()
    await pool.close()
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not descendants()


def response_of(case: dict) -> str:
    size = case.get("size", 0)
    built = {
        "nested": "\\boxed{" + "(" * size + "1" + ")" * size + "}",
        "long": "\\boxed{" + "1" * size + "}",
        "dollars": "$x$ \\boxed{1} " * size,
    }
    return case.get("response") or built[case["build"]]


async def test_verdicts_keep_the_order_of_their_responses_and_equal_the_librarys(pool: VerifierPool) -> None:
    responses, specs = [], []
    for n in range(1, 9):
        responses += [
            rf"\boxed{{\frac{{{n}}}{{{2 * n if n % 2 else 3 * n}}}}}",
            rf"\boxed{{{n}}}",
            f"<answer>{CAT}</answer>",
        ]
        specs += [HALF, RewardSpec(ground_truth="3"), DETECTION]
    verdicts = await pool.score(responses, specs, 0.5, ["a", "b", "c"] * 8)
    assert verdicts == score_batch(responses, specs, 0.5)
    assert {verdict.accuracy for verdict in verdicts} == {0.0, 1.0}


@pytest.mark.parametrize("case", POISON, ids=lambda case: case["reason"])
async def test_a_hostile_answer_gets_its_verdict_and_delays_nobody(pool: VerifierPool, case: dict) -> None:
    spec = HALF if case["verifier"] == "mathverify" else CUSTOM

    async def timed(response: str, spec: RewardSpec) -> tuple[str, float]:
        started_s = time.monotonic()
        verdict = (await pool.score([response], [spec], 0.5))[0]
        return verdict.status, time.monotonic() - started_s

    honest = [rf"\boxed{{\frac{{{os.getpid()}}}{{{n}}}}}" for n in range(3, 7)]
    poisoned, *others = await asyncio.gather(timed(response_of(case), spec), *(timed(text, HALF) for text in honest))
    assert poisoned[0] == case["expect"] or case["expect"] == "any"
    assert poisoned[1] < 2 * DEADLINE_S + 2
    for status, delay_s in others:
        assert status == "ok"
        assert delay_s < DEADLINE_S + 1


async def test_after_all_of_that_every_worker_is_there_and_no_stray_process(pool: VerifierPool) -> None:
    await pool.score([r"\boxed{\frac{9}{17}}"], [HALF])
    await asyncio.sleep(0.5)
    assert len(pool.worker_pids) == 1
    assert {process.pid for process in descendants()} >= set(pool.worker_pids)
    assert len(descendants()) == 2
    assert pool.metrics()["pool/num_waiting"] == 0.0


async def test_a_burst_of_hostile_answers_leaves_honest_ones_their_turn(pool: VerifierPool) -> None:
    towers = [rf"\boxed{{{n}^{{9^{{9^{{9^{{9}}}}}}}}}}" for n in range(2, 8)]

    async def honest(n: int) -> float:
        started_s = time.monotonic()
        assert (await pool.score([rf"\boxed{{\frac{{1}}{{{n}}}}}"], [HALF]))[0].status == "ok"
        return time.monotonic() - started_s

    verdicts, *delays_s = await asyncio.gather(
        pool.score(towers, [HALF] * len(towers)), *(honest(n) for n in range(30, 36))
    )
    assert [verdict.status for verdict in verdicts] == ["fault"] * len(towers)
    assert max(delays_s) < DEADLINE_S + 1


async def test_equal_answers_are_judged_once(pool: VerifierPool) -> None:
    before = pool.metrics()
    dressed = [f"{thought} \\boxed{{\\frac{{77}}{{154}}}}" for thought in "abcdefgh"]
    plain = [text.replace("\\frac{77}{154}", "0.50000") for text in dressed]
    verdicts = await pool.score(dressed * 2 + plain, [HALF] * 24)
    assert {verdict.accuracy for verdict in verdicts} == {1.0}
    assert pool.metrics()["pool/num_by_workers"] - before["pool/num_by_workers"] <= 16


async def test_a_killed_worker_loses_no_answer(pool: VerifierPool) -> None:
    work = asyncio.create_task(pool.score([rf"\boxed{{\frac{{{n}}}{{41}}}}" for n in range(40)], [HALF] * 40))
    await asyncio.sleep(0.05)
    for pid in pool.worker_pids:
        os.kill(pid, signal.SIGKILL)
    assert {verdict.status for verdict in await work} == {"ok"}


class LateWorker:
    """Answers in the same turn of the loop in which its patience runs out, before the timer has been heard."""

    pid = 1

    def __init__(self) -> None:
        self.reader = self

    def at_eof(self) -> bool:
        return False

    def yield_cpu(self) -> None:
        pass

    async def ask(self, job: Job) -> Result:
        await asyncio.sleep(PATIENCE_S - 0.03)
        time.sleep(0.06)  # noqa: ASYNC251  the busy loop is the point
        return Result(job.number, Outcome(1.0))


class LateNursery:
    """Forks late workers."""

    async def spawn(self) -> LateWorker:
        return LateWorker()

    async def end(self, worker: LateWorker) -> str:
        return ""

    async def close(self) -> None:
        pass


async def test_an_answer_as_late_as_its_patience_leaves_no_lane_without_a_worker() -> None:
    crew = Crew(1, 16, Setup(OPTIONS, 2**30, ()), 5.0, PoolMetrics())
    crew._nursery = LateNursery()  # type: ignore[assignment]
    await crew._add_worker()
    crew._watch(crew._run_lane())
    for _ in range(3):
        async with asyncio.timeout(5):
            assert await crew.score("x", HALF, 1.0) == Outcome(1.0)
    await crew.close()


async def test_a_killed_nursery_loses_no_answer(pool: VerifierPool) -> None:
    nursery = next(process for process in descendants() if process.pid not in pool.worker_pids)
    work = asyncio.create_task(pool.score([rf"\boxed{{\frac{{{n}}}{{43}}}}" for n in range(40)], [HALF] * 40))
    await asyncio.sleep(0.05)
    nursery.kill()
    assert {verdict.status for verdict in await work} == {"ok"}
    assert len(descendants()) == 2


async def test_metrics_tell_latency_and_rates_per_verifier_and_source(pool: VerifierPool) -> None:
    await pool.score([f"<answer>{CAT}</answer>"], [DETECTION], None, ["coco"])
    figures = pool.metrics()
    assert figures["source/coco/ok_rate"] == 1.0
    assert 0.0 < figures["verifier/detection/latency_p50_s"] <= figures["verifier/detection/latency_p99_s"]
    assert figures["verifier/mathverify/fault_rate"] > 0.0


async def test_faults_beyond_the_limit_stop_the_run_with_a_sample() -> None:
    pool = VerifierPool(1, RewardOptions(), DEADLINE_S, fault_limit=0.5)
    await pool.start()
    try:
        bad = RewardSpec(ground_truth="not a number")
        good = await pool.score([r"\boxed{1}"] * 100, [RewardSpec(ground_truth="1")] * 100, 0.5, ["good"] * 100)
        assert {verdict.status for verdict in good} == {"ok"}
        with pytest.raises(FaultRateError, match="'broken'") as caught:
            await pool.score([r"\boxed{7}"] * 64, [bad] * 64, 0.5, ["broken"] * 64)
        assert "not a number" in str(caught.value)
        assert r"\boxed{7}" in str(caught.value)
    finally:
        await pool.close()
    with pytest.raises((CrewError, RuntimeError)):
        await pool.score([r"\boxed{\frac{1}{3}}"], [HALF])


async def test_a_pool_that_cannot_start_says_why_and_leaves_nothing() -> None:
    pool = VerifierPool(1, preload=["mathverfy"])
    with pytest.raises(NurseryDied, match="did you mean 'mathverify'"):
        await pool.start()
    assert len(descendants()) <= 2
    with pytest.raises(ValueError, match="num_workers"):
        VerifierPool(0)
