"""Scenes of the eight tasks and the questions that can be asked about each. Called by the data builder and the warm start.

A scene is a picture of digits and bars. Several questions fit one scene: the builder asks one of them, the warm start several. Every
generator takes its randomness from the caller, and draws again where a scene found no room for its things.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from examples.digits.rendering import BAR, DigitPool, Scene, Thing, cut_out, overlap

TASKS = ("math", "puzzle", "chart", "science", "counting", "ocr", "grounding", "detection")
PERCEPTION = ("grounding", "detection")
SIDES_PX = (100, 164)
"""Shortest and longest side of a picture: 4 to 6 image tokens of 28 px."""
MAX_OVERLAP = 0.08
BOX_FORM = '[{"bbox_2d":[x1,y1,x2,y2],"label":name}]'


@dataclass(frozen=True)
class Question:
    """One question about a scene. `answer` is what goes into \\boxed{}; the box tasks say their `things`, from left to right."""

    task: str
    prompt: str
    thought: str
    answer: str = ""
    things: tuple[Thing, ...] = ()


class NoRoomError(Exception):
    """The picture is full; the caller draws another."""


@dataclass
class Canvas:
    """A picture in the making."""

    width: int
    height: int
    pool: DigitPool
    rng: random.Random
    things: list[Thing] = field(default_factory=list)

    @property
    def side(self) -> int:
        """The shorter side, px."""
        return min(self.width, self.height)

    def put(self, thing: Thing) -> Thing:
        """Place a thing where it says. NoRoomError where it would leave the picture or cover another."""
        x1, y1, x2, y2 = thing.box
        is_inside = x1 >= 2 and y1 >= 2 and x2 <= self.width - 2 and y2 <= self.height - 2
        if not is_inside or overlap(thing.box, [other.box for other in self.things]) > MAX_OVERLAP:
            raise NoRoomError
        self.things.append(thing)
        return thing

    def digit(self, value: int, height: float, centre: tuple[float, float] | None = None) -> Thing:
        """A digit about `height` px high, around `centre` or anywhere there is room."""
        ink = cut_out(value, height, self.pool, self.rng)
        darkness = self.rng.uniform(0.5, 0.95)
        rows, columns = ink.shape
        for _ in range(20 if centre is None else 1):
            if centre is None:
                x, y = self.rng.randint(2, self.width - 2 - columns), self.rng.randint(2, self.height - 2 - rows)
            else:
                x, y = round(centre[0] - columns / 2), round(centre[1] - rows / 2)
            try:
                return self.put(Thing(value, ink, x, y, darkness))
            except NoRoomError:
                continue
        raise NoRoomError

    def bar(self, x1: float, y1: float, x2: float, y2: float) -> Thing:
        """A filled rectangle, px."""
        ink = np.ones((round(y2) - round(y1), round(x2) - round(x1)), np.float32)
        return self.put(Thing(BAR, ink, round(x1), round(y1), self.rng.uniform(0.35, 0.6)))

    def scene(self) -> Scene:
        """The finished picture."""
        return Scene(self.width, self.height, tuple(self.things))


def from_left(things: Sequence[Thing]) -> tuple[Thing, ...]:
    """Things by their left edge."""
    return tuple(sorted(things, key=lambda thing: (thing.left, thing.top)))


def told(values: Sequence[int]) -> str:
    """Digits in words, with spaces."""
    return " ".join(map(str, values))


def scatter(canvas: Canvas, values: Sequence[int]) -> tuple[Thing, ...]:
    """Digits anywhere; the more there are, the smaller."""
    low, high = {1: (0.4, 0.7), 2: (0.35, 0.6), 3: (0.3, 0.5)}.get(len(values), (0.26, 0.4))
    return tuple(canvas.digit(value, canvas.rng.uniform(low, high) * canvas.side) for value in values)


def row_of(canvas: Canvas, values: Sequence[int], top: float, bottom: float) -> tuple[Thing, ...]:
    """Digits side by side within two heights of the picture, unevenly spaced and not quite level."""
    pitch = (canvas.width - 8) / len(values)
    height = min(bottom - top, pitch * 1.1)
    placed = []
    for place, value in enumerate(values):
        size = canvas.rng.uniform(0.6, 0.85) * height
        slack = max(bottom - top - size, 0.0) * 0.35
        x = 4 + pitch * (place + 0.5 + canvas.rng.uniform(-0.07, 0.07))
        y = (top + bottom) / 2 + canvas.rng.uniform(-slack, slack)
        placed.append(canvas.digit(value, size, (x, y)))
    return tuple(placed)


def math_scene(canvas: Canvas) -> list[Question]:
    """Two digits; their sum or difference."""
    first, second = (thing.value for thing in from_left(scatter(canvas, canvas.rng.choices(range(10), k=2))))
    large, small = max(first, second), min(first, second)
    return [
        Question("math", "What is the sum of the two digits?", f"{first} + {second}", str(first + second)),
        Question("math", "What is the difference of the two digits?", f"{large} - {small}", str(large - small)),
    ]


def puzzle_scene(canvas: Canvas) -> list[Question]:
    """A row of digits: an arithmetic sequence to continue, or equal digits and an odd one."""
    rng = canvas.rng
    if rng.random() < 0.4:
        common, odd = rng.sample(range(10), 2)
        row = [common] * rng.choice([3, 4])
        row[rng.randrange(len(row))] = odd
        question = Question("puzzle", "Which digit is the odd one out?", told(row), str(odd))
    else:
        step, length = rng.choice([-2, -1, 1, 2, 3]), 3
        start = rng.choice([value for value in range(10) if 0 <= value + length * step <= 9])
        row = [start + step * place for place in range(length)]
        thought = f"{told(row)} step {step}"
        question = Question("puzzle", "Which digit comes next?", thought, str(row[-1] + step))
    row_of(canvas, row, 0.1 * canvas.height, 0.9 * canvas.height)
    return [question]


def chart_scene(canvas: Canvas) -> list[Question]:
    """Bars one to four units high, each above the digit that names it; a unit is a seventh of the picture."""
    rng = canvas.rng
    labels = rng.sample(range(10), rng.choice([2, 3, 3]))
    heights = [rng.randint(1, 4) for _ in labels]
    row_of(canvas, labels, 0.68 * canvas.height, 0.97 * canvas.height)
    pitch, base, unit = (canvas.width - 8) / len(labels), 0.66 * canvas.height, canvas.height / 7
    for place, height in enumerate(heights):
        x, half = 4 + pitch * (place + 0.5), pitch * rng.uniform(0.2, 0.38)
        canvas.bar(x - half, base - unit * height, x + half, base)
    asked = rng.randrange(len(labels))
    questions = [
        Question("chart", f"How tall is the bar above {labels[asked]}?", told(heights), str(heights[asked])),
        Question("chart", "What is the total height of all bars?", " + ".join(map(str, heights)), str(sum(heights))),
    ]
    for word, height in (("tallest", max(heights)), ("shortest", min(heights))):
        if heights.count(height) == 1:
            named = labels[heights.index(height)]
            questions.append(Question("chart", f"Which digit has the {word} bar?", told(heights), str(named)))
    return questions


def science_scene(canvas: Canvas) -> list[Question]:
    """A thermometer beside its scale, or a balance whose heavier side hangs lower."""
    rng = canvas.rng
    if rng.random() < 0.5:
        step = rng.choice([1, 2])
        start, level = rng.randrange(10 - 2 * step), rng.randrange(3)
        pitch, base = 0.3 * canvas.height, 0.95 * canvas.height
        middles = [base - pitch * (place + 0.5) for place in range(3)]
        for place, middle in enumerate(middles):
            canvas.digit(start + step * place, 0.78 * pitch, (0.65 * canvas.width, middle))
        left = rng.uniform(0.1, 0.25) * canvas.width
        canvas.bar(left, middles[level], left + 0.15 * canvas.width, base)
        reading = start + step * level
        return [Question("science", "What does the thermometer read?", f"level {level + 1}", str(reading))]
    left, right = rng.sample(range(10), 2)
    low, high = rng.uniform(0.68, 0.76) * canvas.height, rng.uniform(0.3, 0.38) * canvas.height
    for value, x in ((left, 0.24), (right, 0.76)):
        size = rng.uniform(0.36, 0.46) * canvas.side
        canvas.digit(value, size, (x * canvas.width, low if value == max(left, right) else high))
    middle, half = canvas.width / 2, 0.04 * canvas.width
    canvas.bar(middle - half, 0.25 * canvas.height, middle + half, 0.95 * canvas.height)
    large, small = max(left, right), min(left, right)
    prompt = "How much weight is missing on the lighter side?"
    return [
        Question("science", "Which weight on the balance is heavier?", f"{left} and {right}", str(large)),
        Question("science", prompt, f"{large} - {small}", str(large - small)),
    ]


def counting_scene(canvas: Canvas) -> list[Question]:
    """Scattered digits; how many of a value, or of all."""
    rng = canvas.rng
    value, *others = rng.sample(range(10), 3)
    values = [value] * rng.choice([1, 2, 2, 3, 3, 4]) + rng.choices(others, k=rng.choice([0, 1, 2]))
    scatter(canvas, values)
    asked = value if rng.random() < 0.75 else rng.choice([*others, *range(10)])
    found, everything = values.count(asked), from_left(canvas.things)
    return [
        Question("counting", f"How many {asked}s are there?", told([asked] * found) or "none", str(found)),
        Question(
            "counting", "How many digits are there?", told([thing.value for thing in everything]), str(len(values))
        ),
    ]


def ocr_scene(canvas: Canvas) -> list[Question]:
    """One or two rows, each a number of two to four digits."""
    rng = canvas.rng
    num_rows = rng.choice([1, 2])
    prompts = ["Read the number."] if num_rows == 1 else [f"Read the {place} number." for place in ("top", "bottom")]
    questions = []
    for place, prompt in enumerate(prompts):
        number = [rng.randint(1, 9), *rng.choices(range(10), k=rng.choice([1, 2, 2, 3 if num_rows == 1 else 1]))]
        top, bottom = (0.04 + 0.92 * edge / num_rows for edge in (place, place + 1))
        row_of(canvas, number, top * canvas.height, bottom * canvas.height)
        questions.append(Question("ocr", prompt, told(number), "".join(map(str, number))))
    return questions


def box_prompt(opening: str) -> str:
    """A box question: what to look for, then the form of the answer."""
    return f"{opening} Think, then answer <answer>{BOX_FORM}</answer>."


def grounding_scene(canvas: Canvas) -> list[Question]:
    """One digit to find: by its value, by its size among its like, or by the side it lies on of another."""
    rng = canvas.rng
    value, other, *rest = rng.sample(range(10), 5)
    kind = rng.choice(["value", "size", "side"])
    if kind == "value":
        things = scatter(canvas, [value, other, *rest[: rng.choice([0, 1, 2])]])
        asked = rng.sample(things, 2)
        return [grounding(f"the {thing.value}", thing) for thing in asked]
    if kind == "size":
        sizes = [rng.uniform(0.26, 0.32), rng.uniform(0.46, 0.58)]
        small, large = (canvas.digit(value, size * canvas.side) for size in sizes)
        scatter(canvas, [other] * rng.choice([0, 1]) + rest[:1])
        if small.area * 1.6 > large.area:
            raise NoRoomError
        return [grounding(f"the smallest {value}", small), grounding(f"the largest {value}", large)]
    one, two, mark = scatter(canvas, [value, value, other])
    for near, far, axis in (("left of", "right of", 0), ("above", "below", 1)):
        low, middle, high = sorted((one, mark, two), key=lambda thing: thing.box[axis] + thing.box[axis + 2])
        gaps = [_middle(b, axis) - _middle(a, axis) for a, b in ((low, middle), (middle, high))]
        if middle is mark and min(gaps) > 12:
            return [
                grounding(f"the {value} {near} the {other}", low),
                grounding(f"the {value} {far} the {other}", high),
            ]
    raise NoRoomError


def _middle(thing: Thing, axis: int) -> float:
    return (thing.box[axis] + thing.box[axis + 2]) / 2


def grounding(what: str, thing: Thing) -> Question:
    """The question for the box of one digit."""
    return Question("grounding", box_prompt(f"Locate {what}."), str(thing.value), things=(thing,))


def detection_scene(canvas: Canvas) -> list[Question]:
    """One to six digits; the boxes of all, of one value or of two."""
    rng = canvas.rng
    one, two, *rest = rng.sample(range(10), 4)
    values = [one] * rng.choice([1, 1, 2, 2, 3]) + [two] * rng.choice([0, 1, 1, 2]) + rest[: rng.choice([0, 1])]
    scatter(canvas, values)
    questions = [detection(canvas.things, "Detect all digits.", range(10))]
    questions += [
        detection(canvas.things, f"Detect all instances of {value}.", [value]) for value in {one, *values[-1:]}
    ]
    if two in values:
        questions.append(detection(canvas.things, f"Detect all {one}s and {two}s.", [one, two]))
    return questions


def detection(things: Sequence[Thing], opening: str, values: Sequence[int]) -> Question:
    """The question for the boxes of all digits that have one of these values."""
    found = from_left([thing for thing in things if thing.value in values])
    return Question("detection", box_prompt(opening), str(len(found)), things=found)


SCENES: dict[str, Callable[[Canvas], list[Question]]] = {
    "math": math_scene,
    "puzzle": puzzle_scene,
    "chart": chart_scene,
    "science": science_scene,
    "counting": counting_scene,
    "ocr": ocr_scene,
    "grounding": grounding_scene,
    "detection": detection_scene,
}
WIDE = ("puzzle", "ocr")
"""Tasks whose digits stand in a row: their pictures are at least as wide as high."""


def compose(task: str, pool: DigitPool, rng: random.Random) -> tuple[Scene, list[Question]]:
    """A scene of a task with all its questions."""
    while True:
        width, height = rng.randint(*SIDES_PX), rng.randint(*SIDES_PX)
        if task in WIDE and width < height:
            width, height = height, width
        canvas = Canvas(width, height, pool, rng)
        try:
            questions = SCENES[task](canvas)
        except NoRoomError:
            continue
        return canvas.scene(), questions
