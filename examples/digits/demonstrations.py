"""What a demonstrator writes for a question: the responses of the supervised warm start.

Clean demonstrations are right and well formed. Noisy ones carry a known share of mistakes, per task, like data written by people:
the policy learned from them is uncertain, so reinforcement learning has something to improve. Called by the warm start.
"""

import dataclasses
import json
import random
from dataclasses import dataclass, field

from examples.digits.rendering import BAR, BLANK
from examples.digits.scenes import PERCEPTION, Box, Question, cell_box, spots


def box_answer(boxes_xyxy: tuple[Box, ...], label: str) -> str:
    """The JSON list of boxes that goes between the answer tags."""
    return json.dumps([{"bbox_2d": list(box), "label": label} for box in boxes_xyxy])


def body_of(question: Question) -> str:
    """What stands between the answer tags."""
    if question.task in PERCEPTION:
        return box_answer(question.boxes_xyxy, question.label)
    return f"\\boxed{{{question.answer}}}"


def respond(question: Question) -> str:
    """The clean demonstration of a question."""
    return f"<think>{question.thought}</think>\n<answer>{body_of(question)}</answer>"


@dataclass(frozen=True)
class Noise:
    """Shares of demonstrations with a mistake, each in [0, 1]; `wrong` and `unboxed` per task, 0 where a task is not named.

    wrong             a wrong final answer, or boxes that slipped
    unboxed           the answer is right and stands between the tags without \\boxed{}
    careless_thought  nothing between the think tags
    lost_tag          one of the four tags is missing
    """

    wrong: dict[str, float] = field(default_factory=dict)
    unboxed: dict[str, float] = field(default_factory=dict)
    careless_thought: float = 0.0
    lost_tag: float = 0.0


def near_digit(value: int, rng: random.Random) -> int:
    """Another number close to `value`, never below 0."""
    return rng.choice(
        [other for other in (value - 2, value - 1, value - 1, value + 1, value + 1, value + 2) if other >= 0]
    )


def slip_boxes(boxes: tuple[Box, ...], rng: random.Random) -> tuple[Box, ...]:
    """Boxes with a mistake: an edge or the whole box off by half a cell, a box left out, or one given twice."""
    slipped = list(boxes)
    kind = rng.random()
    if len(slipped) > 1 and kind < 0.35:
        slipped.pop(rng.randrange(len(slipped)))
        return tuple(slipped)
    if kind < 0.45:
        slipped.append(rng.choice(slipped))
        return tuple(slipped)
    for index in range(len(slipped)):
        if index and rng.random() < 0.5:
            continue
        box = list(slipped[index])
        if rng.random() < 0.5:
            edge = rng.randrange(4)
            box[edge] += rng.choice([-14, 14])
        else:
            axis, shift = rng.randrange(2), rng.choice([-28, -14, 14, 28])
            box[axis] += shift
            box[axis + 2] += shift
        slipped[index] = (max(0, box[0]), max(0, box[1]), max(14, box[2]), max(14, box[3]))
    return tuple(slipped)


def wrong_answer(question: Question, rng: random.Random) -> str:
    """A mistaken final answer: near the right one for numbers, two digits swapped or one misread for readings."""
    if question.task == "ocr":
        digits = list(question.answer)
        if rng.random() < 0.5:
            digits[rng.randrange(len(digits))] = str(rng.randrange(10))
        else:
            digits.pop(rng.randrange(len(digits)))
        return "".join(digits)
    return str(near_digit(int(question.answer), rng))


def respond_noisily(question: Question, noise: Noise, rng: random.Random) -> str:
    """A demonstration that is wrong, out of format or careless with the shares of `noise`."""
    if rng.random() < noise.wrong.get(question.task, 0.0):
        if question.task in PERCEPTION:
            question = dataclasses.replace(question, boxes_xyxy=slip_boxes(question.boxes_xyxy, rng))
        else:
            question = dataclasses.replace(question, answer=wrong_answer(question, rng))
    thought = f"<think>{question.thought}</think>\n"
    if rng.random() < noise.careless_thought:
        thought = "<think></think>\n"
    body = body_of(question)
    if question.task not in PERCEPTION and rng.random() < noise.unboxed.get(question.task, 0.0):
        body = question.answer
    response = f"{thought}<answer>{body}</answer>"
    if rng.random() < noise.lost_tag:
        response = response.replace(rng.choice(["<think>", "</think>", "<answer>", "</answer>"]), "", 1)
    return response


def cell_word(value: int) -> str:
    """A cell in a dense reading."""
    return {BLANK: ".", BAR: "#"}.get(value, str(value))


def reading_exercises(cells: list[list[int]], rng: random.Random) -> list[tuple[str, str]]:
    """Auxiliary questions about any grid, as (prompt, response): every cell, one cell, the place and the box of a digit."""
    row, column = rng.randrange(len(cells)), rng.randrange(len(cells[0]))
    value = rng.choice([value for line in cells for value in line if value >= 0])
    found = spots(cells, value)
    boxed = rng.choice(found)
    return [
        ("Read every cell.", "\n".join(" ".join(map(cell_word, line)) for line in cells)),
        (f"What is in row {row + 1} column {column + 1}?", cell_word(cells[row][column])),
        (f"Where is each {value}?", ", ".join(f"row {r + 1} column {c + 1}" for r, c in found)),
        (f"Give the box of row {boxed[0] + 1} column {boxed[1] + 1}.", box_answer((cell_box(*boxed),), str(value))),
    ]
