"""Device time in closed form against decoding step by step, and lengths against their distribution."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from vtriune.plan.simulated_device import Costs, Decoder, Finished, Lengths, SimulatedCompletion

COSTS = Costs(decode_base_s=0.5, decode_per_sequence_s=0.25, prefill_s=0.0)


def step_by_step(
    lengths: list[int], max_sequences: int, publish_after: float
) -> dict[int, tuple[float, dict[int, int]]]:
    """index → (when it ends, version → number of tokens), one decode step at a time; version 1 from the first step that
    ends after `publish_after`."""
    waiting, running, now_s = list(enumerate(lengths)), {}, 0.0
    ends: dict[int, tuple[float, dict[int, int]]] = {}
    spans: dict[int, dict[int, int]] = {index: {} for index, _ in waiting}
    while waiting or running:
        while waiting and len(running) < max_sequences:
            index, length = waiting.pop(0)
            running[index] = length
        now_s += COSTS.step_s(len(running))
        version = int(now_s > publish_after)
        for index in list(running):
            spans[index][version] = spans[index].get(version, 0) + 1
            running[index] -= 1
            if not running[index]:
                del running[index]
                ends[index] = now_s, spans[index]
    return ends


# Steps end at multiples of a quarter second: a publish falls on one of them, or further from it than rounding.
publish_times = st.floats(0.1, 30.0).filter(lambda at_s: not 0 < abs(at_s - round(4 * at_s) / 4) < 1e-9)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=10), st.integers(1, 4), publish_times)
def test_ends_and_version_spans_are_those_of_decoding_step_by_step(
    lengths: list[int], max_sequences: int, publish_after: float
) -> None:
    decoder = Decoder(COSTS, max_sequences)
    finished = decoder.submit([SimulatedCompletion(0, index, length) for index, length in enumerate(lengths)], 0.0)
    finished += decoder.pause(publish_after)
    decoder.resume(1, publish_after)
    finished += decoder.advance(1e6)
    expected = step_by_step(lengths, max_sequences, publish_after)
    assert len(finished) == len(lengths)
    for item in finished:
        ends_s, spans = expected[item.completion.index]
        assert item.at_s == pytest.approx(ends_s, abs=1e-6)
        assert dict(item.spans) == spans
        assert [version for version, _ in item.spans] == sorted(spans)


def test_a_pause_delays_every_end_by_its_length_and_loses_no_token() -> None:
    def ends(pause_s: float) -> list[Finished]:
        decoder = Decoder(COSTS, 4)
        decoder.submit([SimulatedCompletion(0, index, length) for index, length in enumerate([3, 5, 9])], 0.0)
        early = decoder.pause(2.0)
        assert decoder.next_end_s() == math.inf
        assert decoder.advance(2.0 + pause_s) == []
        decoder.resume(1, 2.0 + pause_s)
        return early + decoder.advance(1e6)

    for short, long in zip(ends(1.0), ends(11.0), strict=True):
        assert long.at_s - short.at_s == pytest.approx(10.0)
        assert sum(num_tokens for _, num_tokens in long.spans) == long.completion.length


def test_a_groups_prefill_stalls_its_engine_once() -> None:
    decoder = Decoder(Costs(1.0, 0.0, prefill_s=7.0), 8)
    decoder.submit([SimulatedCompletion(0, index, 4, index == 0) for index in range(3)], 0.0)
    assert [item.at_s for item in decoder.advance(100.0)] == pytest.approx([11.0] * 3)


@pytest.mark.parametrize(("median", "sigma", "cap"), [(400.0, 0.9, 2048), (100.0, 0.3, 2048), (1500.0, 1.2, 2048)])
def test_the_mean_length_is_that_of_scipys_log_normal_cut_at_the_cap(median: float, sigma: float, cap: int) -> None:
    distribution = stats.lognorm(s=sigma, scale=median)
    below, _ = integrate.quad(lambda x: x * distribution.pdf(x), 0, cap)
    assert Lengths(median, sigma, cap).mean == pytest.approx(below + cap * distribution.sf(cap), rel=1e-6)


def test_drawn_lengths_have_that_mean_and_repeat_by_group() -> None:
    lengths = Lengths()
    drawn = np.stack([lengths.draw(0, group_id, 8) for group_id in range(4000)])
    assert drawn.max() == lengths.cap
    assert drawn.mean() == pytest.approx(lengths.mean, rel=0.05)
    assert np.array_equal(lengths.draw(0, 7, 8), drawn[7])
    within = np.corrcoef(np.log(drawn[:, 0]), np.log(drawn[:, 1]))[0, 1]
    assert within == pytest.approx(lengths.group_share, abs=0.1)
