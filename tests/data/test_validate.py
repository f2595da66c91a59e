"""Checks at load: every kind of bad row named with file and row, through the real verifiers; helper processes that end."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import verifiers
from tests.data.rows import DETECTION_PARM, MODEL, encoded, row, write_parquet
from verifiers import RewardOptions
from vtriune.data import DataError, build_store
from vtriune.data.processing import Preprocessor
from vtriune.data.validate import Checks

ONE_BOX = '[{"bbox_2d": [1, 2, 30, 40], "label": "7"}]'
NO_WEIGHTS = DETECTION_PARM | {"det_reward_ratio": dict.fromkeys(DETECTION_PARM["det_reward_ratio"], 0.0)}  # type: ignore[call-overload]

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a truncated image": (
        {"images": [{"bytes": encoded(60, 60)[:3000], "path": None}]},
        r"images\[0\] cannot be decoded",
    ),
    "bytes that are no image": (
        {"images": [{"bytes": b"GIF?", "path": None}]},
        r"images\[0\] cannot be decoded: no picture begins with b'GIF\?'",
    ),
    "an image without a marker": (
        {"prompt": [{"role": "user", "content": "How many?"}]},
        "0 <image> markers for 1 images",
    ),
    "a marker without an image": ({"images": []}, "1 <image> markers for 0 images"),
    "a prompt too long": (
        {"prompt": [{"role": "user", "content": "<image>" + "12 " * 900}]},
        r"tokens, images included; data\.max_prompt_tokens is 512",
    ),
    "an unknown verifier": ({"verifier": "mathverifi"}, "unknown verifier 'mathverifi', did you mean 'mathverify'"),
    "no gold": ({"answer": "", "ground_truth": ""}, "no gold answer"),
    "a gold that nothing equals": ({"ground_truth": "\\boxed{"}, r"reward_model: .*gold"),
    "a gold that is no box": (
        {"verifier": "detection", "verifier_parm": DETECTION_PARM, "ground_truth": "seven"},
        "reward_model: ",
    ),
    "weights that sum to 0": (
        {"verifier": "detection", "verifier_parm": NO_WEIGHTS, "ground_truth": ONE_BOX},
        "sum to 0",
    ),
    "ratios that sum to 0": ({"accuracy_ratio": 0.0, "format_ratio": 0.0}, "positive, finite sum"),
}


@pytest.fixture(scope="module")
def checks() -> Iterator[Checks]:
    checks = Checks(Preprocessor(MODEL, 784, 168 * 168, 512), prompt_pool=True, num_workers=1)
    yield checks
    checks.close()


def test_every_kind_of_bad_row_is_named_with_file_and_row_and_reason(checks: Checks, tmp_path: Path) -> None:
    rows = [row(0), *(row(number, **changes) for number, (changes, _) in enumerate(BAD.values(), 1)), row(99)]
    path = write_parquet(tmp_path / "train_math_bad_13.parquet", rows)
    with pytest.raises(DataError, match=f"{len(BAD)} of {len(rows)} rows cannot be trained on") as error:
        build_store([path], tmp_path / "store", checks=checks)
    lines = str(error.value).splitlines()[1:-1]
    assert len(lines) == len(BAD) - 1, "markers and images that differ in number are one reason"
    assert all(str(path) in line for line in lines)
    store = build_store([path], tmp_path / "store", checks=checks, on_bad_row="quarantine")
    assert (len(store), store.index.num_quarantined) == (2, len(BAD))
    assert store.quarantine_path is not None
    listed = [json.loads(line) for line in store.quarantine_path.read_bytes().splitlines()]
    for number, (bad, (kind, (_, reason))) in enumerate(zip(listed, BAD.items(), strict=True), 1):
        assert (bad["file"], bad["row"]) == (str(path), number), kind
        assert re.search(reason, "; ".join(bad["reasons"])), f"{kind}: {bad['reasons']}"


def test_good_rows_of_every_form_pass(checks: Checks, tmp_path: Path) -> None:
    rows = [
        row(0),
        row(1, images=None, prompt=[{"role": "user", "content": "What is 1?"}]),
        row(2, verifier="detection", verifier_parm=DETECTION_PARM, ground_truth=ONE_BOX, answer=ONE_BOX),
        row(3, verifier="detection", verifier_parm=DETECTION_PARM, ground_truth="[]", answer="[]"),
        row(
            4,
            images=[{"bytes": encoded(50, 70, kind=kind), "path": None} for kind in ("JPEG", "WEBP", "BMP")],
            prompt=[{"role": "user", "content": "<image><image><image>"}],
        ),
    ]
    path = write_parquet(tmp_path / "good.parquet", rows)
    assert len(build_store([path], tmp_path / "store", checks=checks)) == len(rows)


def test_a_normalised_row_is_checked_with_the_size_that_the_model_will_see(checks: Checks, tmp_path: Path) -> None:
    parm = DETECTION_PARM | {"det_verifier_normalized": True}
    gold = '[{"bbox_2d": [100, 200, 333, 400], "label": "7"}]'
    boxes = {"verifier": "detection", "verifier_parm": parm, "ground_truth": gold, "answer": gold}
    images = [{"bytes": encoded(50, 70), "path": None}, {"bytes": encoded(90, 30), "path": None}]
    two = {"images": images, "prompt": [{"role": "user", "content": "<image><image>"}]}
    path = write_parquet(tmp_path / "boxes.parquet", [row(0, **boxes), row(1, **boxes, **two)])
    with pytest.raises(DataError, match=r"row 1: reward_model: .*verifier_parm\.image") as error:
        build_store([path], tmp_path / "store", checks=checks)
    assert "row 0" not in str(error.value)


def test_an_unknown_parameter_is_refused(checks: Checks, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row(0, verifier_parm={"tolerence": 0.1})])
    path = tmp_path / "parameter.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError, match=r"parameter\.parquet, row 0: reward_model: .*no parameter 'tolerence'"):
        build_store([path], tmp_path / "store", checks=checks)


def test_a_build_ends_the_processes_it_started(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    path = write_parquet(tmp_path / "good.parquet", [row(number) for number in range(3)])
    build_store([path], tmp_path / "store", checks=Checks(num_workers=2))
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before


def test_the_identity_follows_options_limits_and_pool() -> None:
    identities = {
        Checks().identity,
        Checks(prompt_pool=True).identity,
        Checks(options=RewardOptions(fold_case="all")).identity,
        Checks(Preprocessor(MODEL, 784, 1568, 512)).identity,
        Checks(Preprocessor(MODEL, 784, 1568, 513)).identity,
        Checks(Preprocessor(MODEL, 784, 3136, 513)).identity,
    }
    assert len(identities) == 6
    assert Checks().identity == Checks(num_workers=3).identity


def test_a_gold_answer_that_kills_its_checker_is_named_by_file_and_row_and_the_others_are_stored(
    tmp_path: Path,
) -> None:
    function = "tests.verifiers.user_functions:misbehave_on_gold"
    parm = {"verifier": "python", "verifier_parm": {"function": function}}
    rows = [row(number, ground_truth=gold, **parm) for number, gold in enumerate(("1", "exit", "2", "spin in C", "3"))]
    path = tmp_path / "golds.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    checks = Checks(options=RewardOptions(python=(function,), deadline_s=1.0), num_workers=1)
    store = build_store([path], tmp_path / "store", checks=checks, on_bad_row="quarantine")
    assert store.quarantine_path is not None
    bad = [json.loads(line) for line in store.quarantine_path.read_bytes().splitlines()]
    assert [(item["file"], item["row"]) for item in bad] == [(str(path), 1), (str(path), 3)]
    assert [
        bool(re.search(how, item["reasons"][0]))
        for how, item in zip(("status 7", "no answer within"), bad, strict=True)
    ]
    assert len(store) == 3


def test_checking_processes_end_with_their_parent() -> None:
    code = (
        "import os, signal, psutil\n"
        "from verifiers import RewardSpec\n"
        "from vtriune.data.schema import Sample, Turn\n"
        "from vtriune.data.validate import Checks\n"
        "sample = Sample(0, 's', [Turn('user', '1?')], [], RewardSpec(ground_truth='1'), '', '')\n"
        "checks = Checks(num_workers=1)\n"
        "assert checks.examine([sample])[0].problems == []\n"
        "print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_identity_of_the_checks_follows_every_file_of_the_reward_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "verifiers"
    shutil.copytree(Path(verifiers.__file__).parent, library, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(verifiers, "__file__", str(library / "__init__.py"))
    before = Checks().identity
    for path in sorted(library.rglob("*.py")):
        path.write_text(path.read_text() + "# another rule\n")
        assert Checks().identity != before, (
            f"rows checked by another {path.relative_to(library)} would not be checked again"
        )
        before = Checks().identity
