"""The prompt pool: ten and ten distinct sentences, one of each appended."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from vtriune.data.prompt_pool import ANSWER_SENTENCES, REASONING_SENTENCES, append_cot


def test_there_are_ten_distinct_sentences_of_each_kind_and_none_is_fused() -> None:
    for pool in (REASONING_SENTENCES, ANSWER_SENTENCES):
        assert len(set(pool)) == len(pool) == 10
        assert all(sentence.endswith(".") and sentence.count(".") == 1 for sentence in pool)
    assert all(r"\boxed{}" in sentence for sentence in ANSWER_SENTENCES)
    assert not any("boxed" in sentence for sentence in REASONING_SENTENCES)


@given(st.text(max_size=40), st.integers(0, 2**63))
def test_a_prompt_gets_one_sentence_of_each_separated_by_spaces(text: str, seed: int) -> None:
    appended = append_cot(text, random.Random(seed))
    expected = {f"{text.rstrip()} {first} {second}" for first in REASONING_SENTENCES for second in ANSWER_SENTENCES}
    assert appended in expected
    assert appended == append_cot(text, random.Random(seed))


def test_every_pair_of_sentences_is_drawn_about_equally_often() -> None:
    drawn = Counter(append_cot("", random.Random(seed)) for seed in range(20_000))
    assert len(drawn) == 100
    assert min(drawn.values()) > 120
    assert max(drawn.values()) < 280
