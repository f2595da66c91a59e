"""The pool under every hostile answer of cases/poison.jsonl: nothing is lost, nobody waits, no process stays behind."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest
import pytest_asyncio

from verifiers import RewardOptions, RewardSpec, check_gold, score_batch
from verifiers.pool.breaker import FaultRateError
from verifiers.pool.figures import PoolMetrics
from verifiers.pool.fork_server import ForkServerDied
from verifiers.pool.frames import Job, Result, Setup
from verifiers.pool.lanes import PATIENCE_S, Lanes, LanesError
from verifiers.pool.pool import VerifierPool
from verifiers.registry import Context, Outcome, Task

DEADLINE_S = 1.5
HALF = RewardSpec(ground_truth=r"\boxed{\frac{1}{2}}")
MISBEHAVE = "tests.verifiers.user_functions:misbehave"
ON_GOLD = f"{MISBEHAVE}_on_gold"
CUSTOM = RewardSpec(ground_truth="x", verifier="python", verifier_parm={"function": MISBEHAVE})
CAT = "[{'bbox_2d': [0, 0, 10, 10], 'label': 'cat'}]"
DETECTION = RewardSpec(ground_truth=CAT, verifier="detection", verifier_parm={"det_reward_ratio": {"map": 1.0}})
POISON = [json.loads(line) for line in (Path(__file__).parents[1] / "cases" / "poison.jsonl").read_text().splitlines()]
OPTIONS = RewardOptions(python=(MISBEHAVE, ON_GOLD), deadline_s=DEADLINE_S)

pytestmark = pytest.mark.asyncio(loop_scope="module")


def descendants() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "verifiers.worker" in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    """Empty for one that has ended, waited for or not."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[VerifierPool]:
    pool = VerifierPool(1, OPTIONS, fault_limit=1.0, memory_limit_bytes=768 * 1024**2)
    await pool.start()
    yield pool
    pids = pool.worker_pids
    await pool.close()
    await pool.close()
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not descendants()


async def test_signals_that_end_a_job_are_left_to_whoever_owns_the_pool(pool: VerifierPool) -> None:
    pids = [process.pid for process in descendants()]
    restarts = pool.metrics()["pool/num_restarts"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for pid in pids:
            os.kill(pid, number)
    await asyncio.sleep(0.2)
    (verdict,) = await pool.score(["right"], [CUSTOM])
    assert (verdict.status, verdict.accuracy) == ("ok", 1.0)
    assert pool.metrics()["pool/num_restarts"] == restarts
    assert {process.pid for process in descendants()} >= set(pids)


@pytest.mark.parametrize("made", ["run", "forked"])
async def test_what_a_verifier_starts_can_be_terminated_as_ever(pool: VerifierPool, made: str) -> None:
    (verdict,) = await pool.score([f"terminate what is {made}"], [CUSTOM])
    assert (verdict.status, verdict.accuracy) == ("ok", 1.0), verdict.reason


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


async def test_golds_are_checked_as_one_by_one_and_bad_ones_are_listed_however_many(pool: VerifierPool) -> None:
    bad = [
        RewardSpec(ground_truth=r"\boxed{"),
        RewardSpec(),
        RewardSpec(ground_truth="1", verifier="detecton"),
        RewardSpec(ground_truth="1", accuracy_ratio=0.0, format_ratio=0.0),
        msgspec.structs.replace(DETECTION, ground_truth="a cat"),
        RewardSpec(ground_truth="EF", verifier="multiple_choice"),
    ] * 40
    good = [HALF, DETECTION, RewardSpec(ground_truth="7"), RewardSpec(ground_truth="a word", verifier="ocr")]
    specs = [*bad, *good, *bad]
    found = await pool.check_golds(specs)
    assert found == [check_gold(spec, options=pool.options) for spec in specs]
    assert [problem is None for problem in found] == [False] * len(bad) + [True] * len(good) + [False] * len(bad)


async def test_a_gold_that_hangs_or_kills_its_worker_is_a_problem_of_its_row_alone(pool: VerifierPool) -> None:
    golds = ["a", "sleep", "b", "exit", "raise", "c", "spin in C", "signal", "d"]
    specs = [msgspec.structs.replace(CUSTOM, ground_truth=gold, verifier_parm={"function": ON_GOLD}) for gold in golds]
    started_s = time.monotonic()
    found = dict(zip(golds, await pool.check_golds(specs), strict=True))
    assert time.monotonic() - started_s < 3 * DEADLINE_S + 2
    assert [gold for gold, problem in found.items() if problem is None] == ["a", "b", "c", "d"]
    for gold, how in (
        ("sleep", "no answer within"),
        ("exit", "status 7"),
        ("raise", "on purpose"),
        ("signal", "SIGSEGV"),
    ):
        assert f"the gold answer {gold!r} cannot be judged: python: " in (found[gold] or "")
        assert how in (found[gold] or "")


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


class LateForkServer:
    """Forks late workers."""

    async def spawn(self) -> LateWorker:
        return LateWorker()

    async def end(self, worker: LateWorker) -> str:
        return ""

    async def close(self) -> None:
        pass


async def test_an_answer_as_late_as_its_patience_leaves_no_lane_without_a_worker() -> None:
    lanes = Lanes(1, 16, Setup(OPTIONS, 2**30, ()), 5.0, PoolMetrics())
    lanes._server = LateForkServer()  # type: ignore[assignment]
    await lanes._add_worker()
    lanes._watch(lanes._run_lane())
    for _ in range(3):
        async with asyncio.timeout(5):
            task = Task("x", HALF.gold, None, Context(OPTIONS, 1.0))
            assert await lanes.score(task, HALF) == Outcome(1.0)
    await lanes.close()


async def test_a_killed_fork_server_loses_no_answer(pool: VerifierPool) -> None:
    server = next(process for process in descendants() if process.pid not in pool.worker_pids)
    work = asyncio.create_task(pool.score([rf"\boxed{{\frac{{{n}}}{{43}}}}" for n in range(40)], [HALF] * 40))
    await asyncio.sleep(0.05)
    server.kill()
    assert {verdict.status for verdict in await work} == {"ok"}
    assert len(descendants()) == 2


async def test_metrics_tell_latency_and_rates_per_verifier_and_source(pool: VerifierPool) -> None:
    await pool.score([f"<answer>{CAT}</answer>"], [DETECTION], None, ["coco"])
    figures = pool.metrics()
    assert figures["source/coco/ok_rate"] == 1.0
    assert 0.0 < figures["verifier/detection/latency_p50_s"] <= figures["verifier/detection/latency_p99_s"]
    assert figures["verifier/mathverify/fault_rate"] > 0.0


async def test_faults_beyond_the_limit_stop_the_run_with_a_sample() -> None:
    pool = VerifierPool(1, RewardOptions(deadline_s=DEADLINE_S), fault_limit=0.5)
    await pool.start()
    try:
        bad = RewardSpec(ground_truth="not a number", verifier="counting")
        good = await pool.score([r"\boxed{1}"] * 100, [RewardSpec(ground_truth="1")] * 100, 0.5, ["good"] * 100)
        assert {verdict.status for verdict in good} == {"ok"}
        with pytest.raises(FaultRateError, match="'broken'") as caught:
            await pool.score([r"\boxed{7}"] * 64, [bad] * 64, 0.5, ["broken"] * 64)
        assert "not a number" in str(caught.value)
        assert r"\boxed{7}" in str(caught.value)
    finally:
        await pool.close()
    with pytest.raises((LanesError, RuntimeError)):
        await pool.score([r"\boxed{\frac{1}{3}}"], [HALF])


async def test_a_pool_that_cannot_start_says_why_and_leaves_nothing() -> None:
    pool = VerifierPool(1, preload=["mathverfy"])
    with pytest.raises(ForkServerDied, match="did you mean 'mathverify'"):
        await pool.start()
    assert len(descendants()) <= 2
    with pytest.raises(ValueError, match="num_workers"):
        VerifierPool(0)


async def test_a_pool_starts_in_whatever_frame_the_answers_of_its_run_are() -> None:
    """Its test of itself has no image, whose size a frame may need."""
    for frame in ("original_px", "resized_px", "norm_1000", "norm_1"):
        pool = VerifierPool(1, RewardOptions(frame=frame))
        await pool.start()
        await pool.close()
