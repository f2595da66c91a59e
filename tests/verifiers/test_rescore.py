"""Archived responses scored anew."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec.structs import replace
from tokenizers import Tokenizer

import bench.english
from tests.actors.test_recorder import a_step
from tests.record.groups import scored, trajectory
from verifiers import ImageSize, IouStep, RewardOptions, RewardSpec, score, score_batch
from verifiers.rescore import options_of
from vtriune.messages import ScoredGroup, Trajectory
from vtriune.record.recording import Recording

FOUND = "<think>a</think>\n<answer>[{'bbox_2d': [0, 0, %d, 10], 'label': 'cat'}]</answer>"
BOX = RewardSpec(
    ground_truth="[{'bbox_2d': [0, 0, 100, 10], 'label': 'Cat'}]",
    verifier="detection",
    verifier_parm={"det_reward_ratio": {"iou_max_label_first": 1.0, "map": 0.25, "iou_completeness": 0.3}},
)
IN_PIXELS = replace(BOX, verifier_parm=BOX.verifier_parm | {"det_verifier_normalized": True})
"""Its gold is per thousand of the image: without the image's size it cannot be scored."""
OPTIONS = RewardOptions(
    fold_case="all", iou_schedule=(IouStep(0.5, 0.6), IouStep(1.0, 0.9)), evaluation_threshold=0.75, report="weighted"
)
DECODER = bench.english.decoder(vocabulary=1000)
ROWS = [
    (r"\boxed{\frac{1}{2}}", {"ground_truth": "0.5", "verifier": "mathverify"}),
    (r"\boxed{41}", {"ground_truth": "42", "verifier": "mathverify"}),
    ("words", {"ground_truth": "words", "verifier": "mathverify"}),
    ("<answer>3</answer>", {"ground_truth": "3", "verifier": "counting"}),
]


def rescored(folder: Path, table: pa.Table | Path, *more: str) -> subprocess.CompletedProcess[str]:
    source = table if isinstance(table, Path) else folder / "rollouts.parquet"
    if not isinstance(table, Path):
        pq.write_table(table, source)
    command = [sys.executable, "-m", "verifiers.rescore", str(source), "-o", str(folder / "out.parquet")]
    return subprocess.run([*command, "--workers", "1", *more], capture_output=True, text=True, timeout=120)


def run_archive(folder: Path, options: RewardOptions) -> dict[str, Path]:
    """The files that a run's recorder leaves of groups scored under `options`, at several points of the run, and an evaluation."""
    recording = Recording(folder, options=options, decoder=DECODER)
    texts = [FOUND % width for width in (100, 92, 80, 70, 55, 0)]
    number = {
        "train": RewardSpec(ground_truth=r"\frac{1}{2}"),
        "evaluate": RewardSpec(ground_truth="Word", verifier="ocr"),
    }
    for index, progress in enumerate((0.0, 0.3, 2 / 3, 1.0)):
        recording.add(judged(index + 1, BOX, texts, progress, options))
        recording.add(judged(index + 21, IN_PIXELS, texts, progress, options))
        recording.add(judged(index + 11, number["train"], [r"\boxed{0.5}", "half", ""], progress, options))
    recording.add(judged(-1, BOX, texts, None, options))
    recording.add(judged(-2, number["evaluate"], ["<answer>word</answer>"], None, options))
    _, ticket = recording.step(a_step(1, 1, [1, 11, 21, 2, 12, 3, 13], {}, evaluated=[-1, -2]))
    recording.write_step(ticket)
    recording.forget_step(ticket)
    recording.close()
    return {path.name.split("-")[0]: path for path in (folder / "rollouts").glob("*.parquet")}


def judged(
    group_id: int, spec: RewardSpec, texts: list[str], progress: float | None, options: RewardOptions
) -> ScoredGroup:
    sizes = [[ImageSize((640, 480), (616, 476))]] * len(texts)
    verdicts = score_batch(texts, [spec] * len(texts), progress, options=options, image_sizes=sizes)
    assert all(verdict.status != "fault" for verdict in verdicts)
    trajectories = [spoken(text) for text in texts]
    purpose = "train" if progress is not None else "evaluate"
    made = scored(verdicts, trajectories, group_id=group_id, purpose=purpose, spec=spec)
    lease = replace(made.group.lease, progress=progress)
    return replace(made, group=replace(made.group, lease=lease))


def spoken(text: str) -> Trajectory:
    """A completion whose tokens are those of `text`."""
    ids = [*Tokenizer.from_buffer(DECODER.content).encode(text).ids, *DECODER.end_token_ids]
    return replace(trajectory(len(ids), text), token_ids=np.asarray(ids, np.int32))


def test_rescoring_a_runs_own_archive_gives_the_archived_verdicts(tmp_path: Path) -> None:
    files = run_archive(tmp_path, OPTIONS)
    assert sorted(files) == ["evaluation", "unconsumed", "version"]
    for path in files.values():
        assert pq.read_table(path)["text"].null_count == pq.read_metadata(path).num_rows, "texts are told by the tokens"
        done = rescored(tmp_path, path)
        assert done.returncode == 0, done.stdout + done.stderr
        out = pq.read_table(tmp_path / "out.parquet").to_pylist()
        assert all(isinstance(row["text"], str) for row in out)
        assert len({row["reward"] for row in out}) > 1
        for row in out:
            archived = [row[name] for name in ("status", "reward", "accuracy", "format", "reason")]
            assert archived == [row[f"verdict_{name}"] for name in ("status", "reward", "accuracy", "format", "reason")]
            assert dict(row["components"]) == json.loads(row["verdict_components"])


def test_options_of_the_command_line_take_the_place_of_the_files_one_by_one(tmp_path: Path) -> None:
    path = run_archive(tmp_path, OPTIONS)["evaluation"]
    assert options_of(path, {}) == OPTIONS
    assert options_of(path, {"evaluation_threshold": 0.95}) == replace(OPTIONS, evaluation_threshold=0.95)


def test_an_archive_without_its_tokenizer_is_not_scored_as_empty_answers(tmp_path: Path) -> None:
    path = run_archive(tmp_path, OPTIONS)["version"]
    for tokenizer in path.parent.glob("tokenizer-*.json"):
        tokenizer.unlink()
    refused = rescored(tmp_path, path)
    assert refused.returncode == 1
    assert "must lie beside it" in refused.stdout.replace("\n", " ")
    assert not (tmp_path / "out.parquet").exists()


def test_a_file_cannot_let_functions_run(tmp_path: Path) -> None:
    path = run_archive(tmp_path, RewardOptions(python=("os:system",)))["version"]
    refused = rescored(tmp_path, path)
    assert refused.returncode == 1
    assert '--options \'{"python":["os:system"]}\'' in refused.stdout.replace("\n", "")
    assert options_of(path, {"python": []}).python == ()


def test_a_file_gets_its_verdicts_beside_its_columns(tmp_path: Path) -> None:
    responses, specs = zip(*ROWS, strict=True)
    done = rescored(
        tmp_path,
        pa.table({"response": responses, "reward_model": [json.dumps(spec) for spec in specs], "kept": range(4)}),
        "--response",
        "response",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["kept"] for row in out] == [0, 1, 2, 3]
    for row, (response, spec) in zip(out, ROWS, strict=True):
        expected = score(response, RewardSpec(**spec), None)
        assert row["verdict_status"] == expected.status
        assert row["verdict_reward"] == (None if math.isnan(expected.reward) else expected.reward)
        assert json.loads(row["verdict_components"]) == expected.components
    assert "fault" in done.stdout
    assert not list(tmp_path.glob(".*partial"))


def test_a_file_without_its_columns_is_refused_by_name(tmp_path: Path) -> None:
    done = rescored(tmp_path, pa.table({"answer": ["a"]}))
    assert done.returncode == 1
    assert "reward_model" in done.stdout
    assert not (tmp_path / "out.parquet").exists()


def test_a_file_that_is_not_whole_and_a_pool_without_workers_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "of [brackets]"
    folder.mkdir()
    path = folder / "rollouts.parquet"
    path.write_bytes(b"PAR1 and no more")
    refused = rescored(tmp_path, path)
    assert refused.returncode == 1
    assert f"{path}: is no whole Parquet file" in refused.stdout
    assert "Traceback" not in refused.stderr
    idle = rescored(tmp_path, path, "--workers", "0")
    assert idle.returncode == 2
    assert "--workers" in idle.stderr.splitlines()[-1]
    assert "Traceback" not in idle.stderr
