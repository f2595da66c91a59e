"""What a demonstrator writes for a question: the responses of the supervised warm start.

Clean demonstrations are right and well formed. Noisy ones carry a known share of mistakes, per task, like data written by people, and
edges of boxes drawn by a careful or by a careless hand: the policy learned from them is uncertain, so reinforcement learning has
something to improve. Called by the warm start and by the builder.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from examples.digits.rendering import BAR, Scene, in_thousandths
from examples.digits.scenes import PERCEPTION, Question, detection, from_left, grounding, told

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
Thousandths = tuple[int, int, int, int]


@dataclass(frozen=True)
class Hand:
    """How edges are drawn: off by a normal deviation, as a share of the box's side, that is small for a share `careful` of them."""

    careful: float
    small: float
    large: float


STEADY = Hand(1.0, 0.012, 0.012)


@dataclass(frozen=True)
class Noise:
    """wrong: share of wrong final answers by task, 0 where a task is not named; careless_thought: nothing between the think tags;
    lost_tag: one of the four tags is missing; hand: how boxes are drawn."""

    wrong: dict[str, float] = field(default_factory=dict)
    careless_thought: float = 0.0
    lost_tag: float = 0.0
    hand: Hand = STEADY


def boxes_of(question: Question, scene: Scene) -> list[tuple[str, Thousandths]]:
    """Label and box, in thousandths of the picture, of everything a box question asks for."""
    size = (scene.width, scene.height)
    return [(str(thing.value), in_thousandths(thing.box, size)) for thing in question.things]


def box_answer(boxes: Sequence[tuple[str, Sequence[int]]]) -> str:
    """The JSON list of boxes that goes between the answer tags."""
    return json.dumps([{"bbox_2d": list(box), "label": label} for label, box in boxes], separators=(",", ":"))


def respond(question: Question, scene: Scene) -> str:
    """The clean demonstration of a question."""
    body = box_answer(boxes_of(question, scene)) if question.things else f"\\boxed{{{question.answer}}}"
    return f"<think>{question.thought}</think>\n<answer>{body}</answer>"


def wrong_answer(question: Question, rng: random.Random) -> str:
    """A mistaken final answer: near the right one for numbers, a digit misread or left out for readings."""
    if question.task == "ocr":
        digits = list(question.answer)
        if rng.random() < 0.5:
            digits[rng.randrange(len(digits))] = str(rng.randrange(10))
        else:
            digits.pop(rng.randrange(len(digits)))
        return "".join(digits)
    value = int(question.answer)
    near = (value - 2, value - 1, value - 1, value + 1, value + 1, value + 2)
    return str(rng.choice([other for other in near if other >= 0]))


def respond_noisily(question: Question, scene: Scene, noise: Noise, rng: random.Random) -> str:
    """A demonstration that is wrong, out of format or careless with the shares of `noise`; its boxes are exact."""
    response = respond(question, scene)
    if question.task not in PERCEPTION and rng.random() < noise.wrong.get(question.task, 0.0):
        response = response.replace(f"{{{question.answer}}}", f"{{{wrong_answer(question, rng)}}}")
    if rng.random() < noise.careless_thought:
        response = response.replace(question.thought, "", 1)
    if rng.random() < noise.lost_tag:
        response = response.replace(rng.choice(TAGS), "", 1)
    return response


def exercises(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions about what any picture shows: every digit from left to right, all boxes, and those of one value."""
    digits = from_left([thing for thing in scene.things if thing.value != BAR])
    values = [thing.value for thing in digits]
    value = rng.choice(values)
    found = [
        Question("reading", "Read all digits.", told(values), "".join(map(str, values))),
        detection(scene.things, "Detect all digits.", range(10)),
        detection(scene.things, f"Detect all instances of {value}.", [value]),
    ]
    alone = [thing for thing in digits if values.count(thing.value) == 1]
    return found + [grounding(f"the {thing.value}", thing) for thing in rng.sample(alone, min(2, len(alone)))]
