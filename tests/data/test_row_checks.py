"""What the checks say of single rows and of a source's rows together, through the real verifiers."""

import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.encodings import png, saved
from tests.data.rows import DETECTION_PARM, MODEL, encoded, row, write_parquet
from vtriune.data import DataError, build_store
from vtriune.data.processing import Preprocessor
from vtriune.data.schema import parse_row
from vtriune.data.validate import Checks


@pytest.fixture(scope="module")
def checks() -> Iterator[Checks]:
    checks = Checks(Preprocessor(MODEL, 784, 168 * 168, 512), num_workers=1)
    yield checks
    checks.close()


def boxes(*corners: list[float], label: str = "7") -> dict[str, Any]:
    gold = json.dumps([{"bbox_2d": box, "label": label} for box in corners])
    return {"verifier": "detection", "verifier_parm": DETECTION_PARM, "ground_truth": gold, "answer": gold}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (boxes([1, 2, 30, 40], [20, 5, 10, 8]), r"gold box \[20.0, 5.0, 10.0, 8.0\] has x2 < x1.*x \+ width"),
        (boxes([20, 8, 30, 5]), "has y2 < y1"),
        (boxes([5, 5, 5, 9]), "has no area"),
        (
            {"verifier": "ocr", "verifier_parm": None, "ground_truth": "The <answer> tag", "answer": ""},
            "holds <answer>, between or behind",
        ),
        ({"answer": "8"}, r"answer '8' is another than ground_truth '\\\\boxed\{13\}'.*leave `answer` empty"),
        ({"images": [{"bytes": saved(np.zeros((9, 9), np.int32), "TIFF"), "path": None}]}, r"images\[0\] holds 32-bit"),
    ],
)
def test_a_row_that_is_wrong_says_what_to_do(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row(13, **changes)]), path)
    with pytest.raises(DataError) as error:
        build_store([path], tmp_path / "store", checks=Checks(num_workers=1))
    line = str(error.value).splitlines()[1]
    assert line.startswith(f"{path}, row 0: ")
    assert re.search(reason, line), line
    assert "scores 0" not in line


@pytest.mark.parametrize(
    ("answer", "gold"), [("13", "\\boxed{13}"), ("\\frac{26}{2}", "13"), ("", "13"), ("13", "$13$")]
)
def test_an_answer_that_means_the_ground_truth_passes(checks: Checks, answer: str, gold: str) -> None:
    sample, _ = parse_row(row(13, answer=answer, ground_truth=gold))
    assert sample is not None
    assert checks.examine([sample])[0].problems == []


def test_what_is_changed_of_pictures_is_counted_by_source_and_told_with_the_first_rows(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    turned = saved(np.zeros((20, 30, 3), np.uint8), "JPEG", exif=exif)
    glass = saved(np.full((20, 30, 4), 100, np.uint8))
    pictures = [encoded(30, 20), turned, glass, turned]
    rows = [row(number, "photos", images=[{"bytes": data, "path": None}]) for number, data in enumerate(pictures)]
    path = write_parquet(tmp_path / "photos.parquet", [*rows, row(9, "digits")])
    store = build_store([path], tmp_path / "store", checks=Checks(num_workers=1))
    assert store.index.notes == {
        "photos": [
            f"2 rows ({path}, rows 1, 3): turned as its EXIF orientation says",
            f"{path}, row 2: transparent pixels laid on white",
        ]
    }


@pytest.mark.parametrize(
    ("golds", "size", "parm", "told"),
    [
        ([[1, 2, 30, 40]] * 30, (40, 50), {}, None),
        ([[0.1, 0.2, 0.5, 1.0]] * 3, (40, 50), {}, "these are fractions.*gold_frame: norm_1$"),
        ([[100, 200, 900, 950]] * 3, (640, 480), {}, "these are thousandths.*gold_frame: norm_1000"),
        ([[100, 200, 900, 950]] * 30, (2000, 1500), {}, "these are thousandths"),
        ([[100, 200, 1900, 1450]] * 3, (2000, 1500), {"det_verifier_normalized": True}, "these are pixels"),
        ([[10, 300, 200, 630]] * 3, (640, 480), {}, "x and y exchanged"),
        (
            [[10, 20, 30, 40]] * 60 + [[10, 20, 3000, 40]],
            (640, 480),
            {},
            "61 gold boxes .* 1 of them outside.*clip those",
        ),
        ([[0.1, 0.2, 0.5, 1.0]] * 3, (40, 50), {"gold_frame": "norm_1"}, None),
    ],
)
def test_boxes_in_another_frame_or_outside_their_pictures_are_told_by_source(
    golds: list[list[float]], size: tuple[int, int], parm: dict[str, Any], told: str | None
) -> None:
    image = saved(Image.new("RGB", size))
    sizes = {"original_size": list(size), "resized_size": list(size)} if parm else {}
    picture = {"images": [{"bytes": image, "path": None}], "verifier_parm": DETECTION_PARM | parm | sizes}
    samples = [
        sample for sample, _ in (parse_row(row(13, **(boxes(gold) | picture))) for gold in golds) if sample is not None
    ]
    checks = Checks(num_workers=1)
    assert [finding.problems for finding in checks.examine(samples)] == [[]] * len(golds)
    remarks = checks.remarks()
    checks.close()
    if told is None:
        assert remarks == {}
    else:
        assert len(remarks["digits"]) == 1
        assert re.search(told, remarks["digits"][0]), remarks


def test_a_picture_over_the_bound_is_a_bad_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "large.parquet", [row(13, images=[{"bytes": encoded(101, 100), "path": None}])])
    with pytest.raises(DataError, match=r"row 0: images\[0\] has 101x100 px.*data\.max_source_pixels"):
        build_store([path], tmp_path / "store", checks=Checks(num_workers=1, max_source_pixels=10_000))
    assert len(build_store([path], tmp_path / "store", checks=Checks(num_workers=1, max_source_pixels=10_100))) == 1


def test_a_picture_that_takes_long_is_named(monkeypatch: pytest.MonkeyPatch, checks: Checks) -> None:
    monkeypatch.setattr("vtriune.data.validate.SLOW_S", 0.0)
    sample, _ = parse_row(row(13))
    assert sample is not None
    (finding,) = checks.examine([sample])
    assert re.fullmatch(r"takes \d+\.\d s to decode each time it is drawn, 40x40 px: reduce it", finding.notes[0])


def test_a_broken_pixel_stream_behind_a_sound_header_is_refused_at_the_check(checks: Checks) -> None:
    whole = png(np.zeros((40, 40), np.uint8), 8)
    packed = zlib.compress(bytes(41 * 40))
    broken = packed[:-6] + bytes(6)
    data = whole.replace(
        packed + struct.pack(">I", zlib.crc32(b"IDAT" + packed)),
        broken + struct.pack(">I", zlib.crc32(b"IDAT" + broken)),
    )
    assert data != whole
    sample, _ = parse_row(row(13, images=[{"bytes": data, "path": None}]))
    assert sample is not None
    (finding,) = checks.examine([sample])
    assert re.search(r"images\[0\] cannot be decoded", finding.problems[0])
