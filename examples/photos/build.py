"""Photographs that scikit-image and scikit-learn ship, and the questions of `annotations.json` about them, as people keep such things:
pictures in a folder and JSON lines of question, answer and image beside it. `python -m examples.photos.build`.

    data/pictures/coffee.png
    data/train/counting.jsonl    {"question": "<image>How many cups are there? …", "answer": "1", "image": "../pictures/coffee.png"}

Boxes are two corners in pixels of the picture as it is displayed. Held out are whole pictures. What such rows do not say stands in
`examples/photos.yaml`: which verifier scores them, and under which name.
"""

import argparse
import importlib.util
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from verifiers import terminal
from vtriune import whole_files

HERE = Path(__file__).parent
DATA_FOLDER = HERE / "data"
TASKS = ("grounding", "detection", "counting", "ocr", "choices")
_BOXES = (
    'Answer between <answer> and </answer> with JSON: [{"bbox_2d": [x1, y1, x2, y2], "label": name}, …], names among: '
)
_SHORT = "Answer between <answer> and </answer> with "


class Row(NamedTuple):
    """One question."""

    task: str
    question: str
    answer: str


def rows(about: Mapping[str, Any]) -> Iterator[Row]:
    """The questions that can be asked about one annotated picture."""
    boxes = about["boxes"]
    for label, places in boxes.items():
        if len(places) == 1:
            yield Row("grounding", f"Locate the {label}. {_BOXES}{label}.", _gold({label: places}))
    if sum(map(len, boxes.values())) > 1:
        yield Row("detection", f"Locate everything that is named. {_BOXES}{', '.join(boxes)}.", _gold(boxes))
    for things, number in about.get("counts", {}).items():
        yield Row("counting", f"How many {things} are there? {_SHORT}a number.", str(number))
    for place, text in about.get("texts", {}).items():
        yield Row("ocr", f"Read {place}. {_SHORT}its text.", text)
    for question, options, letter in about["choices"]:
        listed = " ".join(f"{chr(ord('A') + index)}. {option}" for index, option in enumerate(options))
        yield Row("choices", f"{question} {listed} {_SHORT}the letter.", letter)


def _gold(boxes: Mapping[str, list[list[int]]]) -> str:
    return json.dumps([{"bbox_2d": box, "label": label} for label, places in boxes.items() for box in places])


def shipped(name: str) -> Path:
    """A file of an installed package, which is not imported. FileNotFoundError where the package is not installed."""
    package, _, path = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{package} is not installed; `make setup` installs it (extra `examples`)")
    return Path(spec.submodule_search_locations[0]) / path


def write(folder: Path) -> list[Path]:
    """The pictures and a file per split and task; returns the files of questions."""
    lines: defaultdict[Path, list[str]] = defaultdict(list)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, about in json.loads((HERE / "annotations.json").read_text()).items():
        source = shipped(about["file"])
        picture = folder / "pictures" / f"{name}{source.suffix}"
        shutil.copyfile(source, picture)
        for row in rows(about):
            line = {"question": f"<image>{row.question}", "answer": row.answer, "image": f"../pictures/{picture.name}"}
            lines[folder / about["split"] / f"{row.task}.jsonl"].append(json.dumps(line, ensure_ascii=False))
    for path, text in lines.items():
        path.parent.mkdir(exist_ok=True)
        whole_files.write(path, ("\n".join(text) + "\n").encode())
    return sorted(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA_FOLDER)
    for path in write(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    terminal.open_output()
    main()
