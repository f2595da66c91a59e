"""Checks at load: every kind of bad row named with file and row, through the real verifiers; helper processes that end."""

import io
import re
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
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.rows import DETECTION_PARM, MODEL, encoded, row, write_parquet
from verifiers import RewardOptions, RewardSpec
from vtriune.data import DataError, build_store
from vtriune.data.gold_check import GoldChecker
from vtriune.data.processing import Preprocessor
from vtriune.data.validate import Checks, image_problem

ONE_BOX = '[{"bbox_2d": [1, 2, 30, 40], "label": "7"}]'
NO_WEIGHTS = DETECTION_PARM | {"det_reward_ratio": dict.fromkeys(DETECTION_PARM["det_reward_ratio"], 0.0)}  # type: ignore[call-overload]

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a truncated image": ({"images": [{"bytes": encoded(60, 60)[:3000], "path": None}]}, r"images\[0\] is broken"),
    "bytes that are no image": (
        {"images": [{"bytes": b"GIF?", "path": None}]},
        r"images\[0\] is broken \(UnidentifiedImageError",
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
    assert len(lines) == len(BAD)
    for number, (line, (kind, (_, reason))) in enumerate(zip(lines, BAD.items(), strict=True), 1):
        assert line.startswith(f"{path}, row {number}: "), kind
        assert re.search(reason, line), f"{kind}: {line}"
    store = build_store([path], tmp_path / "store", checks=checks, on_bad_row="quarantine")
    assert (len(store), store.num_quarantined) == (2, len(BAD))


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
        Checks(options=RewardOptions(fold_case=True)).identity,
        Checks(Preprocessor(MODEL, 784, 1568, 512)).identity,
        Checks(Preprocessor(MODEL, 784, 1568, 513)).identity,
        Checks(Preprocessor(MODEL, 784, 3136, 513)).identity,
    }
    assert len(identities) == 6
    assert Checks().identity == Checks(num_workers=3).identity


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]),
    st.floats(0, 1),
    st.sampled_from(["cut", "flip"]),
    st.integers(1, 255),
)
def test_an_image_that_passes_the_check_can_be_decoded(kind: str, where: float, damage: str, mask: int) -> None:
    data = encoded(48, 40, kind=kind)
    place = int(where * (len(data) - 1))
    data = data[:place] if damage == "cut" else data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]
    if image_problem(data) is None:
        with Image.open(io.BytesIO(data)) as image:
            assert image.convert("RGB").size == image.size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_whole_image_passes_and_one_cut_in_half_does_not(kind: str) -> None:
    data = encoded(200, 150, kind=kind)
    assert image_problem(data) is None
    assert image_problem(data[: len(data) // 2]) is not None


SLEEPER = """
import os, time
def judge(response: str, gold: str) -> float:
    if gold == "sleep":
        time.sleep(60)
    if gold == "exit":
        os._exit(3)
    return 1.0
"""


def test_a_gold_answer_that_hangs_or_kills_its_checker_is_a_bad_row_and_the_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_judge.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.setattr("vtriune.data.gold_check._FIRST_DEADLINE_S", 10.0)
    options = RewardOptions(python_allow=("slow_judge:judge",), deadline_s=0.5)
    parm = {"function": "slow_judge:judge"}
    specs = [
        RewardSpec(ground_truth=gold, verifier="python", verifier_parm=parm)
        for gold in ("1", "sleep", "2", "exit", "3")
    ]
    checker = GoldChecker(options, num_workers=1)
    started = time.monotonic()
    found = checker.begin(specs)()
    checker.close()
    assert time.monotonic() - started < 40
    assert [problem is None for problem in found] == [True, False, True, False, True]
    assert "exit" in str(found[3])


def test_a_checking_process_ends_with_its_parent() -> None:
    code = (
        "import os, signal, psutil\n"
        "from verifiers import RewardOptions, RewardSpec\n"
        "from vtriune.data.gold_check import GoldChecker\n"
        "checker = GoldChecker(RewardOptions(), 1)\n"
        "checker.begin([RewardSpec(ground_truth='1')])()\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (pid,) = map(int, done.stdout.split())
    deadline = time.monotonic() + 10
    while (
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
