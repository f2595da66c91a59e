"""Packs and plans: every token once, every prompt once, budgets kept, the same plan on every rank."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batch.plan import Shape, plan
from learner.model.packing import Piece, PromptTokens, pack

shapes = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 40), min_size=1, max_size=6)), min_size=1, max_size=12
).map(lambda groups: [Shape(prompt, tuple(range(len(lengths))), tuple(lengths)) for prompt, lengths in groups])


def rows_of(piece: Piece, shape: Shape) -> int:
    return shape.num_prompt + sum(shape.lengths[i] - 1 for i in piece.completions)


@given(shapes, st.integers(1, 5), st.integers(1, 300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_plan_holds_every_completion_once_within_the_budget_and_is_equally_long_on_all_ranks(
    groups: list[Shape], num_ranks: int, budget: int, share_prompts: bool
) -> None:
    ranks = plan(groups, num_ranks, budget, share_prompts=share_prompts)
    assert len(ranks) == num_ranks
    assert len({len(micro_batches) for micro_batches in ranks}) == 1
    seen = [(p.group, c) for micro_batches in ranks for pieces in micro_batches for p in pieces for c in p.completions]
    assert sorted(seen) == [(g, c) for g, shape in enumerate(groups) for c in shape.completions]
    for micro_batches in ranks:
        for pieces in micro_batches:
            rows = [rows_of(piece, groups[piece.group]) for piece in pieces]
            assert sum(rows) <= budget or len(pieces) == 1
            if not share_prompts:
                assert all(len(piece.completions) == 1 for piece in pieces)


@given(shapes, st.integers(1, 4))
@settings(deadline=None)
def test_a_group_within_the_budget_is_never_split(groups: list[Shape], num_ranks: int) -> None:
    ranks = plan(groups, num_ranks, 10_000)
    assert sorted(p.group for micros in ranks for pieces in micros for p in pieces) == list(range(len(groups)))


def test_many_equal_groups_spread_evenly_over_ranks() -> None:
    ranks = plan([Shape(50, (0, 1), (20, 20))] * 64, 4, 400)
    assert [sum(len(pieces) for pieces in micros) for micros in ranks] == [16, 16, 16, 16]


def test_no_rank_has_more_than_one_micro_batch_more_than_its_rows_ask_for() -> None:
    rng = np.random.default_rng(0)
    groups = [Shape(int(rng.integers(40, 90)), tuple(range(8)), tuple(rng.integers(5, 40, 8))) for _ in range(64)]
    rows = sum(shape.num_prompt + sum(shape.lengths) - 8 for shape in groups)
    (micro_batches,) = plan(groups, 1, 4096)
    assert len(micro_batches) <= -(-rows // 4096) + 1


@given(shapes, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_row_sees_exactly_its_own_trajectory_and_a_target_follows_the_row_that_predicts_it(
    groups: list[Shape], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    prompts, responses, counter = {}, {}, 0
    for index, shape in enumerate(groups):
        offset = np.arange(shape.num_prompt)
        prompts[index] = PromptTokens(
            offset + 1000 * index, np.broadcast_to(offset + rng.integers(3), (3, shape.num_prompt))
        )
        responses[index] = []
        for length in shape.lengths:
            counter += 10_000
            responses[index].append(np.arange(length) + counter)
    pieces = [Piece(index, shape.completions) for index, shape in enumerate(groups)]
    packed = pack(pieces, prompts, responses)
    group, segment = packed.labels()
    rows = np.arange(packed.num_rows)
    sees = (rows[None] <= rows[:, None]) & (group[None] == group[:, None])
    sees &= (segment[None] < 0) | (segment[None] == segment[:, None])
    owners = [(index, completion) for index, shape in enumerate(groups) for completion in shape.completions]
    for row, target, owner in zip(packed.source_rows, packed.target_ids, packed.segment_of_target, strict=True):
        index, completion = owners[owner]
        alone = np.concatenate([prompts[index].token_ids, responses[index][completion]])
        position = int(np.flatnonzero(alone == target)[0])
        assert packed.token_ids[sees[row]].tolist() == alone[:position].tolist()
        first = int(prompts[index].positions[0, 0])
        assert packed.positions[:, sees[row]].tolist() == [list(range(first, first + position))] * 3
    assert packed.num_rows == sum(rows_of(piece, groups[piece.group]) for piece in pieces)
