"""Which rank trains which pieces in which micro-batch: the same answer on every rank, from lengths alone. Pure logic.

Every rank gets the same number of micro-batches, because each one is a collective under FSDP; a micro-batch may be empty
(the learner then runs dummy work of weight 0). Heaviest first, into the least loaded place: at most 4/3 of the optimum.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from learner.model.packing import Piece


@dataclass(frozen=True, slots=True)
class Shape:
    """What a group costs: P prompt tokens, the completions to train on and their lengths."""

    num_prompt: int
    completions: tuple[int, ...]
    """Indices of the completions that are trained on."""
    lengths: tuple[int, ...]
    """Response tokens of each of them."""


@dataclass(frozen=True, slots=True)
class _Work:
    piece: Piece
    num_rows: int
    cost: float


def plan(
    shapes: Sequence[Shape], num_ranks: int, token_budget: int, *, width: int = 1024, share_prompts: bool = True
) -> list[list[list[Piece]]]:
    """`plan[rank][micro-batch]` is the list of pieces to pack; all ranks have equally many micro-batches, at least one.

    `token_budget` bounds the rows of a micro-batch; a single trajectory above it stands alone. `width` is the model's
    hidden size: it weighs attention's quadratic cost against the linear layers'. `share_prompts=False` gives every
    trajectory a prompt of its own. Groups are placed by cost, then by index: the result depends on nothing else.
    """
    works = sorted(
        (
            work
            for index, shape in enumerate(shapes)
            for work in _works(index, shape, token_budget, width, share_prompts)
        ),
        key=lambda work: (-work.cost, work.piece.group, work.piece.completions),
    )
    ranks = _spread(works, num_ranks)
    # At least as many as a rank's rows ask for, unless its pieces are fewer, each above the budget.
    num_micro = max(1, *(min(len(mine), -(-sum(work.num_rows for work in mine) // token_budget)) for mine in ranks))
    while True:
        filled = [_spread(works_of_rank, num_micro) for works_of_rank in ranks]
        fits = all(
            len(bin_) <= 1 or sum(work.num_rows for work in bin_) <= token_budget for bins in filled for bin_ in bins
        )
        if fits:
            return [
                [sorted((w.piece for w in bin_), key=lambda p: (p.group, p.completions)) for bin_ in bins]
                for bins in filled
            ]
        num_micro += 1


def _works(index: int, shape: Shape, token_budget: int, width: int, share_prompts: bool) -> list[_Work]:
    """The group in one piece, or in as few as the budget asks for, each with its own copy of the prompt."""
    # Per piece the length of each of its completions.
    parts: list[dict[int, int]] = []
    room = 0
    for completion, length in zip(shape.completions, shape.lengths, strict=True):
        if not parts or length - 1 > room or not share_prompts:
            parts.append({})
            room = token_budget - shape.num_prompt
        parts[-1][completion] = length
        room -= length - 1
    return [_work(index, shape.num_prompt, part, width) for part in parts]


def _work(index: int, num_prompt: int, lengths: dict[int, int], width: int) -> _Work:
    rows = num_prompt + sum(lengths.values()) - len(lengths)
    # Per layer a row costs about 12·width² in the linear layers and 2·width per key it attends to.
    keys = num_prompt**2 / 2 + sum(num_prompt * length + length**2 / 2 for length in lengths.values())
    return _Work(Piece(index, tuple(lengths)), rows, rows + keys / (6 * width))


def _spread(works: Sequence[_Work], num_places: int) -> list[list[_Work]]:
    """Heaviest first into the least loaded place; ties go to the lower place."""
    places: list[list[_Work]] = [[] for _ in range(num_places)]
    heap = [(0.0, place) for place in range(num_places)]
    for work in works:
        load, place = heapq.heappop(heap)
        places[place].append(work)
        heapq.heappush(heap, (load + work.cost, place))
    return places
