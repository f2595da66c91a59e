"""The path of one's own pictures, as the README has it: check, dry run, three versions, a fourth, export; with a real tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.photos.build import write as write_data
from examples.photos.model import fetch_tokenizer
from examples.photos.model import write as write_model
from tests.system.jobs import ROOT
from vtriune.torchvision_schemas import define_missing_schemas

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.long,
]
TASKS = ("grounding", "detection", "counting", "ocr", "choices")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """The real one, which is not in this repository."""
    try:
        return fetch_tokenizer(tmp_path)
    except RuntimeError as error:
        pytest.skip(f"the tokenizer cannot be had: {error}")


def said_by(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_photographs_are_checked_trained_on_taken_up_again_and_exported(tmp_path: Path, tokenizer: Path) -> None:
    write_data(tmp_path / "data")
    write_model(tmp_path / "model", tokenizer)
    file = tmp_path / "photos.yaml"
    file.write_text((ROOT / "examples/photos.yaml").read_text().replace("examples/photos/", f"{tmp_path}/"))

    checked = said_by("vtriune.data", "check", str(file), "--html", "--out", str(tmp_path / "check"))
    assert "every row can be trained on" in checked
    assert "photos_choices: " in checked
    assert "transparent pixels laid on white" in " ".join(checked.split())
    assert (tmp_path / "check" / "samples.html").is_file()

    launch = ["vtriune.launch", str(file), f"run.folder={tmp_path / 'runs'}"]
    assert "fit to run" in said_by(*launch, "--dry-run")
    assert "trained to version 3 of 3" in said_by(*launch)
    assert "trained to version 4 of 4" in said_by(*launch, "run.steps=4")

    run = tmp_path / "runs" / "photos"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == [0, 1, 2, 3, 4]
    assert max(line.get("mismatch/max_abs", 0.0) for line in lines) < 1e-4
    for line in (lines[0], lines[3], lines[4]):
        assert {f"eval/greedy/source/photos_{task}/reward/mean" for task in TASKS} <= line.keys()
    assert sum(line.get("ledger/faulted", 0.0) for line in lines) == 0

    said_by("vtriune.export", str(run), "--out", str(tmp_path / "export"))
    define_missing_schemas()
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "export")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "export")) == 151_669
    assert model.config.image_token_id == 151_655
