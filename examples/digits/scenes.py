"""Layouts of the eight tasks and the questions that can be asked about each. Called by the data builder and the warm start.

A scene is a small grid of cells (a digit, blank, or a piece of a bar). Several questions fit one scene: the builder asks one of
them, the warm start several. Every generator is an endless stream: it takes its randomness from the caller.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.digits.rendering import BAR, BLANK, CELL_PX

TASKS = ("math", "puzzle", "chart", "science", "counting", "ocr", "grounding", "detection")
PERCEPTION = ("grounding", "detection")
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Question:
    """One question about a scene. `answer` is what goes into \\boxed{}; for the two box tasks `boxes_xyxy` (px) and `label` say it."""

    task: str
    prompt: str
    thought: str
    answer: str
    boxes_xyxy: tuple[Box, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Scene:
    """cells: rows of digit values 0..9, BLANK or BAR; questions: all that can be asked of this layout's task."""

    cells: list[list[int]]
    questions: list[Question]


def cell_box(row: int, column: int) -> Box:
    """The box of a cell in pixels: x1, y1, x2, y2."""
    return (column * CELL_PX, row * CELL_PX, (column + 1) * CELL_PX, (row + 1) * CELL_PX)


def place(rows: int, columns: int, values: list[int], rng: random.Random) -> list[list[int]]:
    """A grid with `values` in random cells."""
    cells = [[BLANK] * columns for _ in range(rows)]
    for spot, value in zip(rng.sample(range(rows * columns), len(values)), values, strict=True):
        cells[spot // columns][spot % columns] = value
    return cells


def math_scene(rng: random.Random) -> Scene:
    """Two digits; their sum, difference or larger one times two."""
    rows, columns = rng.choice([(1, 2), (1, 3), (2, 2), (2, 3)])
    cells = place(rows, columns, [rng.randrange(10), rng.randrange(10)], rng)
    first, second = (value for row in cells for value in row if value >= 0)
    large, small = max(first, second), min(first, second)
    return Scene(
        cells,
        [
            Question("math", "What is the sum of the two digits?", f"{first} + {second}", str(first + second)),
            Question("math", "What is the difference of the two digits?", f"{large} - {small}", str(large - small)),
        ],
    )


def puzzle_scene(rng: random.Random) -> Scene:
    """A row of four: an arithmetic sequence with one gap, or three equal digits and an odd one."""
    if rng.random() < 0.35:
        common, odd = rng.sample(range(10), 2)
        row = [common] * 4
        row[rng.randrange(4)] = odd
        question = Question("puzzle", "Which digit is the odd one out?", " ".join(map(str, row)), str(odd))
        return Scene([row], [question])
    step = rng.choice([-2, -1, 1, 2, 3])
    start = rng.choice([value for value in range(10) if 0 <= value + 3 * step <= 9])
    row = [start + step * i for i in range(4)]
    gap = rng.choice([1, 2, 3, 3])
    hidden = row[gap]
    row[gap] = BLANK
    seen = " ".join("_" if value == BLANK else str(value) for value in row)
    prompt = "Which digit comes next?" if gap == 3 else "Which digit is missing?"
    return Scene([row], [Question("puzzle", prompt, f"{seen}, step {step}", str(hidden))])


def chart_scene(rng: random.Random) -> Scene:
    """Columns of bar cells above distinct digit labels; heights 0 to 3."""
    columns = rng.choice([3, 3, 4])
    labels = rng.sample(range(10), columns)
    heights = [rng.randrange(4) for _ in range(columns)]
    heights[rng.randrange(columns)] = rng.randrange(1, 4)
    cells = [[BAR if heights[column] >= 3 - row else BLANK for column in range(columns)] for row in range(3)] + [labels]
    told = " ".join(map(str, heights))
    asked = rng.randrange(columns)
    questions = [
        Question("chart", f"How tall is the bar above {labels[asked]}?", f"column {asked + 1}", str(heights[asked])),
        Question("chart", "What is the total height of all bars?", " + ".join(map(str, heights)), str(sum(heights))),
    ]
    if heights.count(max(heights)) == 1:
        tallest = labels[heights.index(max(heights))]
        questions.append(Question("chart", "Which digit has the tallest bar?", f"heights {told}", str(tallest)))
    return Scene(cells, questions)


def science_scene(rng: random.Random) -> Scene:
    """A thermometer beside its scale, or a balance with one weight on either side."""
    if rng.random() < 0.5:
        step = rng.choice([1, 2])
        start = rng.randrange(0, 10 - 3 * step)
        level = rng.randrange(1, 5)
        cells = [[BAR if 4 - row <= level else BLANK, start + step * (3 - row)] for row in range(4)]
        reading = start + step * (level - 1)
        return Scene(cells, [Question("science", "What does the thermometer read?", f"level {level}", str(reading))])
    left, right = rng.sample(range(10), 2)
    cells = [[BLANK, BLANK, BLANK], [left, BAR, right]]
    if rng.random() < 0.5:
        cells.reverse()
    large, small = max(left, right), min(left, right)
    return Scene(
        cells,
        [
            Question("science", "Which weight on the balance is heavier?", f"{left} and {right}", str(large)),
            Question(
                "science", "How much weight is missing on the lighter side?", f"{large} - {small}", str(large - small)
            ),
        ],
    )


def spots(cells: list[list[int]], value: int) -> list[tuple[int, int]]:
    """Rows and columns, from 0, of the cells that hold `value`, in reading order."""
    return [(r, c) for r, row in enumerate(cells) for c, cell in enumerate(row) if cell == value]


def told_spots(found: list[tuple[int, int]]) -> str:
    """Cells in words, rows and columns counted from 1."""
    return ", ".join(f"row {row + 1} column {column + 1}" for row, column in found)


def field_scene(
    rng: random.Random, sizes: list[tuple[int, int]], repeats: int, num_others: tuple[int, ...]
) -> list[list[int]]:
    """Scattered digits: one value `repeats` times, among other values that occur once."""
    rows, columns = rng.choice(sizes)
    value, *others = rng.sample(range(10), 1 + rng.choice(num_others))
    return place(rows, columns, ([value] * repeats + others)[: rows * columns], rng)


def counting_scene(rng: random.Random) -> Scene:
    """Scattered digits; how many of a value, or of all."""
    cells = field_scene(rng, [(2, 2), (2, 3), (3, 3), (3, 4)], rng.choice([1, 1, 1, 2, 2]), (1, 2, 3))
    free = [(r, c) for r, row in enumerate(cells) for c, cell in enumerate(row) if cell == BLANK]
    present = sorted({value for row in cells for value in row if value >= 0})
    value = rng.choice(present)
    for row, column in rng.sample(free, min(len(free), rng.choice([0, 0, 1, 2]))):
        cells[row][column] = value
    asked = value if rng.random() < 0.7 else rng.randrange(10)
    per_row = [sum(cell == asked for cell in row) for row in cells]
    all_per_row = [sum(cell >= 0 for cell in row) for row in cells]
    return Scene(
        cells,
        [
            Question("counting", f"How many {asked}s are there?", " + ".join(map(str, per_row)), str(sum(per_row))),
            Question(
                "counting", "How many digits are there?", " + ".join(map(str, all_per_row)), str(sum(all_per_row))
            ),
        ],
    )


def ocr_scene(rng: random.Random) -> Scene:
    """One or two rows, each a number of two or three digits."""
    rows = rng.choice([1, 2])
    columns = rng.choice([3, 4])
    numbers = []
    cells = []
    for _ in range(rows):
        length = rng.choice([2, 3])
        left = rng.randrange(columns - length + 1)
        number = [rng.randrange(1, 10)] + [rng.randrange(10) for _ in range(length - 1)]
        cells.append([BLANK] * left + number + [BLANK] * (columns - length - left))
        numbers.append(number)
    prompts = (
        [f"Read the number in the {place} row." for place in ("top", "bottom")] if rows == 2 else ["Read the number."]
    )
    return Scene(
        cells,
        [
            Question("ocr", prompt, " ".join(map(str, number)), "".join(map(str, number)))
            for prompt, number in zip(prompts, numbers, strict=True)
        ],
    )


def box_prompt(opening: str) -> str:
    """A box question: what to look for, then the form of the answer."""
    return f'{opening} Think, then answer <answer>[{{"bbox_2d": [x1, y1, x2, y2], "label": name}}]</answer>.'


def box_question(task: str, cells: list[list[int]], value: int, opening: str) -> Question:
    """The question for the boxes of all cells that hold `value`."""
    found = spots(cells, value)
    boxes = tuple(cell_box(row, column) for row, column in found)
    return Question(task, box_prompt(opening), told_spots(found), "", boxes, str(value))


def grounding_scene(rng: random.Random) -> Scene:
    """Distinct digits; the box of one of them."""
    cells = field_scene(rng, [(1, 3), (2, 2), (2, 3), (3, 3)], 1, (1, 2, 3))
    values = rng.sample([value for row in cells for value in row if value >= 0], 2)
    return Scene(cells, [box_question("grounding", cells, value, f"Locate the {value}.") for value in values])


def detection_scene(rng: random.Random) -> Scene:
    """A value one to three times among others; the boxes of all its instances."""
    cells = field_scene(rng, [(1, 4), (2, 2), (2, 3), (3, 3)], rng.choice([1, 2, 2, 3]), (1, 1, 2))
    values = sorted(
        {value for row in cells for value in row if value >= 0}, key=lambda value: -len(spots(cells, value))
    )
    return Scene(
        cells, [box_question("detection", cells, value, f"Detect all instances of {value}.") for value in values[:2]]
    )


SCENES: dict[str, Callable[[random.Random], Scene]] = {
    "math": math_scene,
    "puzzle": puzzle_scene,
    "chart": chart_scene,
    "science": science_scene,
    "counting": counting_scene,
    "ocr": ocr_scene,
    "grounding": grounding_scene,
    "detection": detection_scene,
}
