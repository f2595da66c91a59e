"""How fast and how right the verifiers are, beside pycocotools, faster-coco-eval and torchmetrics, in one run on one core.

    python -m bench.verifiers             throughput of ours and of peers, first score, pool
    python -m bench.verifiers --soak      the property tests at full size: 10,000 mAPs, 20,000 answers, 10⁶ fuzzed responses

Peers that are not installed are left out by name (`pip install 'vtriune[peers]'`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.verifier_cases import (
    as_coco,
    coco_sample,
    detection_workload,
    fuzzed_response,
    library_verdict,
    math_pairs,
    pycocotools_average_precision,
)
from verifiers import RewardOptions, RewardSpec, score_batch, terminal
from verifiers.pool.pool import VerifierPool

RELEASED_PER_S = 134.0
ROUNDS = 3
FUZZ_GOLD = "[{'bbox_2d': [10, 20, 30, 40], 'label': 'cat'}]"


def rate(work: Callable[[], Any], num_samples: int, rounds: int = ROUNDS) -> float:
    """Samples per second: the best of some rounds, since other work on the machine only ever slows one down."""
    best_s = float("inf")
    for _ in range(rounds):
        started_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - started_s)
    return num_samples / best_s


def line(what: str, per_s: float, note: str = "") -> None:
    print(f"{what:<58}{per_s:>12,.0f}/s  {note}")


def detection_path() -> None:
    """Response text in, verdict out, all components."""
    responses, specs = detection_workload(8_192)
    score_batch(responses[:64], specs[:64])
    for report in ("full", "weighted"):
        for size in (256, 8, 1):
            options = RewardOptions(report=report)

            def work(size: int = size, options: RewardOptions = options) -> None:
                for first in range(0, len(responses), size):
                    score_batch(responses[first : first + size], specs[first : first + size], options=options)

            per_s = rate(work, len(responses))
            line(
                f"detection, text to verdict, batches of {size}, report {report}",
                per_s,
                f"{per_s / RELEASED_PER_S:.0f} × the released",
            )


def map_samples(num_samples: int) -> list[tuple[Any, ...]]:
    """1 to 10 boxes of three labels, as arrays."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(num_samples):
        num_boxes = int(rng.integers(1, 11))
        corners = rng.integers(0, 800, (num_boxes, 2))
        gold = np.concatenate([corners, corners + rng.integers(20, 200, (num_boxes, 2))], 1).astype(np.float64)
        labels = rng.integers(0, 3, num_boxes).astype(np.int64)
        predicted = gold.copy()
        predicted[:, :2] += rng.integers(-4, 5, (num_boxes, 2))
        predicted[:, 2:] += rng.integers(-4, 5, (num_boxes, 2))
        samples.append((predicted, labels, gold, labels))
    return samples


def coco_peer(dataset_type: Any, evaluation_type: Any, samples: list[tuple[Any, ...]]) -> None:
    """A whole COCO evaluation of each sample, as a reward server does it."""
    with contextlib.redirect_stdout(io.StringIO()):
        for sample in samples:
            truth, found = as_coco(*sample)
            dataset = dataset_type()
            dataset.dataset = truth
            dataset.createIndex()
            evaluation = evaluation_type(dataset, dataset.loadRes(found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()


def mean_average_precision() -> None:
    """Our kernel, alone and through its public function, beside the peers."""
    from verifiers.kernels.average_precision import coco_average_precision, sample_average_precision
    from verifiers.kernels.iou import iou_matrix

    samples = map_samples(4_096)
    overlaps = [iou_matrix(sample[0], sample[2]) for sample in samples]
    out = np.empty(3)

    def kernel() -> None:
        for overlap, (_, labels, _, gold_labels) in zip(overlaps, samples, strict=True):
            sample_average_precision(overlap, labels, gold_labels, out)

    def public() -> None:
        for sample in samples:
            coco_average_precision(*sample)

    figures = {"ours, kernel": rate(kernel, len(samples)), "ours, coco_average_precision": rate(public, len(samples))}
    few = samples[:128]
    with contextlib.suppress(ImportError):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        figures["pycocotools"] = rate(lambda: coco_peer(COCO, COCOeval, few), len(few), 2)
    with contextlib.suppress(ImportError):
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster

        figures["faster-coco-eval"] = rate(lambda: coco_peer(FasterCOCO, COCOeval_faster, few), len(few), 2)
    torchmetrics_rate = torchmetrics_figure(few[:32])
    if torchmetrics_rate:
        figures["torchmetrics"] = torchmetrics_rate
    for name in ("pycocotools", "faster-coco-eval", "torchmetrics"):
        if name not in figures:
            print(f"{name}: not installed, left out")
    for name, per_s in figures.items():
        peers = (
            [f"{figures['ours, kernel'] / per_s:,.0f} × slower than our kernel"] if not name.startswith("ours") else []
        )
        line(f"per-sample COCO mAP: {name}", per_s, *peers)


def torchmetrics_figure(samples: list[tuple[Any, ...]]) -> float:
    """Samples per second, or 0 where torchmetrics or what it needs is missing."""
    try:
        from vtriune.torchvision_schemas import define_missing_schemas

        define_missing_schemas()
        import torch
        from torchmetrics.detection import MeanAveragePrecision
    except (ImportError, RuntimeError):
        return 0.0

    def work() -> None:
        for predicted, labels, gold, gold_labels in samples:
            metric = MeanAveragePrecision(backend="pycocotools")
            found = {
                "boxes": torch.tensor(predicted),
                "scores": torch.ones(len(labels)),
                "labels": torch.tensor(labels),
            }
            metric.update([found], [{"boxes": torch.tensor(gold), "labels": torch.tensor(gold_labels)}])
            metric.compute()

    try:
        return rate(work, len(samples), 1)
    except (ModuleNotFoundError, RuntimeError):
        return 0.0


def first_score() -> None:
    """From `import verifiers` to the first verdict in a fresh process, the kernels' cache warm."""
    probe = (
        "import time; t = time.perf_counter(); from verifiers import RewardSpec, score; a = time.perf_counter() - t;"
        "box = \"[{'bbox_2d': [0, 0, 9, 9], 'label': 'a'}]\";"
        "spec = RewardSpec(ground_truth=box, verifier='detection', verifier_parm={'det_reward_ratio': {'map': 1.0}});"
        "assert score('<answer>' + box + '</answer>', spec).accuracy == 1.0; print(a, time.perf_counter() - t)"
    )
    command = [sys.executable, "-c", probe]
    # A warm cache includes Python's own: the first run may have to write it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    runs = []
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        runs.append([float(figure) for figure in done.stdout.split()])
    import_s, score_s = (min(run[k] for run in runs) for k in (0, 1))
    print(f"import verifiers: {import_s:.3f} s; first detection score: {score_s:.2f} s")


async def pool_throughput(num_workers: int, num_groups: int = 600, sympy_share: float = 0.25) -> None:
    """Mixed groups of 8: half detection, half mathverify, of which a share needs sympy, no two alike."""
    rng = random.Random(num_workers)
    responses, specs = detection_workload(num_groups * 4, seed=1)
    groups = []
    for number in range(num_groups):
        if number % 2:
            first = number // 2 * 8
            groups.append((responses[first : first + 8], specs[first : first + 8]))
        else:
            gold = RewardSpec(ground_truth=rf"\boxed{{\frac{{{number + 1}}}{{{number + 2}}}}}")
            answers = [rf"\boxed{{{k}}}" for k in range(8)]
            for k in range(8):
                if rng.random() < sympy_share:
                    answers[k] = rf"\boxed{{\frac{{{rng.randrange(10**6)}}}{{{number + 2}}}}}"
            plain = RewardSpec(ground_truth=str(number))
            groups.append((answers, [gold if "frac" in answer else plain for answer in answers]))
    pool = VerifierPool(num_workers)
    await pool.start()
    try:
        started_s = time.perf_counter()
        gate = asyncio.Semaphore(32)

        async def one(group: tuple[list[str], list[RewardSpec]]) -> None:
            async with gate:
                await pool.score(*group, 0.5, ["bench"] * 8)

        await asyncio.gather(*(one(group) for group in groups))
        took_s = time.perf_counter() - started_s
    finally:
        await pool.close()
    figures = pool.metrics()
    print(
        f"pool, {num_workers} workers: {60 * num_groups / took_s:,.0f} mixed groups of 8 a minute "
        f"({figures['pool/num_by_workers']:.0f} answers by sympy, p99 {figures['source/bench/latency_p99_s'] * 1e3:.0f} ms)"
    )


def soak(num_maps: int, num_answers: int, num_fuzzed: int) -> None:
    """The property tests at full size; AssertionError with the case where one fails."""
    from verifiers.kernels.average_precision import coco_average_precision

    rng = np.random.default_rng(2026)
    worst, started_s = 0.0, time.perf_counter()
    for _ in range(num_maps):
        sample = coco_sample(rng)
        ours, theirs = coco_average_precision(*sample), pycocotools_average_precision(*sample)
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
        assert worst <= 1e-9, sample
    print(f"{num_maps:,} mAPs equal pycocotools' to {worst:.1e} ({time.perf_counter() - started_s:.0f} s)")
    soak_answers(num_answers)
    soak_fuzzed(num_fuzzed)
    asyncio.run(soak_mathverify(num_fuzzed // 50))


def soak_answers(num_answers: int) -> None:
    """Plain answers decided without math-verify, against math-verify."""
    from verifiers.kinds.plain_answers import boxed_answer, decide

    started_s, num_decided, pairs = time.perf_counter(), 0, math_pairs(10**9, seed=2026)
    while num_decided < num_answers:
        response, gold = next(pairs)
        answer = boxed_answer(response)
        verdict = None if answer is None else decide(gold, answer)
        if verdict is not None:
            num_decided += 1
            assert verdict == library_verdict(response, gold), (response, gold)
    print(f"{num_decided:,} plain answers judged as math-verify does ({time.perf_counter() - started_s:.0f} s)")


def soak_fuzzed(num_fuzzed: int) -> None:
    """Fuzzed responses to every verifier that runs in the front process; none may raise or leave its range."""
    specs = [
        RewardSpec(
            ground_truth=FUZZ_GOLD,
            verifier="detection",
            verifier_parm={"det_reward_ratio": {"map": 1, "iou_max_iou_first": 1}},
        ),
        RewardSpec(ground_truth="B", verifier="multiple_choice"),
        RewardSpec(ground_truth="3", verifier="counting"),
        RewardSpec(ground_truth="stop sign", verifier="ocr"),
        RewardSpec(ground_truth="[0, 0, 10, 10]", verifier="point"),
        RewardSpec(ground_truth="[[0, 0], [9, 0], [9, 9]]", verifier="polygon"),
        RewardSpec(ground_truth="[10, 20]", verifier="temporal"),
        RewardSpec(ground_truth='{"a": 1}', verifier="json_fields"),
    ]
    started_s, rng, num_boxes = time.perf_counter(), random.Random(2026), 0
    for first in range(0, num_fuzzed, 800):
        responses = [fuzzed_response(rng) for _ in range(800)]
        verdicts = score_batch(responses, specs * 100, 0.5)
        for response, verdict in zip(responses, verdicts, strict=True):
            assert verdict.status != "fault", (first, response, verdict)
            assert 0.0 <= verdict.reward <= 1.0 + 1e-12, (first, response, verdict)
            num_boxes += verdict.status == "ok"
    print(
        f"{num_fuzzed:,} fuzzed responses scored, {num_boxes:,} of them readable ({time.perf_counter() - started_s:.0f} s)"
    )


async def soak_mathverify(num_fuzzed: int, group_size: int = 8) -> None:
    """Fuzzed answers to math-verify, which runs in worker processes behind a deadline: each gets its verdict."""
    rng, started_s = random.Random(2027), time.perf_counter()
    spec = RewardSpec(ground_truth=r"\boxed{\frac{1}{2}}", verifier="mathverify")
    pool, counts, gate = VerifierPool(num_workers=2), Counter[str](), asyncio.Semaphore(16)
    await pool.start()

    async def one() -> None:
        async with gate:
            answers = [f"<answer>\\boxed{{{fuzzed_response(rng)}}}</answer>" for _ in range(group_size)]
            verdicts = await pool.score(answers, [spec] * group_size, 0.5, ["fuzz"] * group_size)
            counts.update(verdict.status for verdict in verdicts)
            assert all(verdict.status == "fault" or 0.0 <= verdict.reward <= 1.0 for verdict in verdicts), answers

    try:
        await asyncio.gather(*(one() for _ in range(num_fuzzed // group_size)))
        for _ in range(100):
            # One that was killed over its last answer is being replaced.
            if len(pool.worker_pids) == 2:
                break
            await asyncio.sleep(0.1)
        assert len(pool.worker_pids) == 2, "a worker is missing"
    finally:
        await pool.close()
    assert sum(counts.values()) == num_fuzzed // group_size * group_size
    print(
        f"{num_fuzzed:,} fuzzed answers through math-verify: {dict(counts)} ({time.perf_counter() - started_s:.0f} s)"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--maps", type=int, default=10_000)
    parser.add_argument("--answers", type=int, default=20_000)
    parser.add_argument("--fuzzed", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, max(2, os.cpu_count() or 2)])
    arguments = parser.parse_args()
    if arguments.soak:
        soak(arguments.maps, arguments.answers, arguments.fuzzed)
        return
    first_score()
    detection_path()
    mean_average_precision()
    for num_workers in arguments.workers:
        asyncio.run(pool_throughput(num_workers))


if __name__ == "__main__":
    terminal.open_output()
    main()
