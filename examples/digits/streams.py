"""Endless scenes of the train split for the warm start, in batches of one grid of image tokens. Called by the warm start."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from examples.digits.rendering import Scene, digit_pool
from examples.digits.scenes import TASKS, Question, compose
from examples.digits.vision import grid_of

Asked = tuple[Scene, list[Question], str]
"""A scene, its questions and its task."""


def scenes(seed: str, batch_size: int, weights: Sequence[float] = (1.0,) * len(TASKS)) -> Iterator[list[Asked]]:
    """Batches of scenes of one grid; tasks are drawn with these weights. The same seed gives the same scenes."""
    rng, pool = random.Random(seed), digit_pool("train")
    waiting: dict[tuple[int, int], list[Asked]] = defaultdict(list)
    while True:
        (task,) = rng.choices(TASKS, weights)
        scene, questions = compose(task, pool, rng)
        gathered = waiting[grid_of(scene)]
        gathered.append((scene, questions, task))
        if len(gathered) == batch_size:
            yield list(gathered)
            gathered.clear()
