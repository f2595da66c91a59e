"""Fingerprints of pictures tell copies from others; figures of a source are of its rows."""

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vtriune.data.measures import SAME_BITS, Look, Measures, linked, look, quartiles, same_pictures
from vtriune.data.survey import Measured, leaks, survey


def scene(seed: int) -> Image.Image:
    """Smooth patches of light and dark, as photographs have."""
    grid = np.random.default_rng(seed).integers(0, 256, (6, 8), dtype=np.uint8)
    return Image.fromarray(grid).resize((320, 240), Image.Resampling.BICUBIC).convert("RGB")


def saved_again(picture: Image.Image, size: tuple[int, int] = (200, 150), quality: int = 70) -> Image.Image:
    out = io.BytesIO()
    picture.resize(size).save(out, "JPEG", quality=quality)
    return Image.open(io.BytesIO(out.getvalue()))


def test_a_picture_saved_smaller_and_with_loss_has_almost_the_same_hash_and_another_has_not() -> None:
    hashes = [look(scene(seed)).hash for seed in range(40)]
    assert len(set(hashes)) == 40
    assert all((look(saved_again(scene(seed))).hash ^ hashes[seed]).bit_count() <= SAME_BITS for seed in range(40))
    others = [(one ^ other).bit_count() for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(others) > 8


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 2**64 - 1, 0x00FF00FF00FF00FF]), st.sets(st.integers(0, 63), max_size=5)),
        max_size=30,
    )
)
def test_hashes_are_linked_by_few_bits(drawn: list[tuple[int, set[int]]]) -> None:
    hashes = {base ^ sum(1 << bit for bit in bits) for base, bits in drawn}
    found = linked(hashes)
    groups = [{each} for each in hashes]
    for one in hashes:
        near = [group for group in groups if any((one ^ each).bit_count() <= SAME_BITS for each in group)]
        groups = [group for group in groups if group not in near] + [set().union(*near)]
    assert found == {each: min(group) for group in groups for each in group}


def chart(seed: int) -> Image.Image:
    """Dark bars on white paper: most of it is the same for all."""
    rng, paper = np.random.default_rng(seed), np.full((120, 160), 255, np.uint8)
    for place in range(4):
        paper[120 - rng.integers(20, 100) :, 20 + 32 * place : 36 + 32 * place] = 60
    return Image.fromarray(paper).convert("RGB")


def test_charts_of_one_kind_are_others_and_copies_of_each_are_the_same() -> None:
    looks = [look(chart(seed)) for seed in range(60)]
    assert len(set(linked(each.hash for each in looks).values())) < 20, "hashes alone would do"
    assert len(set(same_pictures(looks).values())) == 60
    copies = [look(saved_again(chart(seed), (112, 84), 80)) for seed in range(60)]
    same = same_pictures(looks + copies)
    assert [same[copy] for copy in copies] == [same[each] for each in looks]


def test_many_pictures_are_compared_in_a_moment() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 50_000, dtype=np.uint64).tolist()
    copies = [each ^ 0b101 for each in hashes[:1000]]
    found = linked(hashes + copies)
    assert len(found) - len(set(found.values())) == 1000


FAR = [0x0, 0xFFFFFFFF, 0xFFFF0000FFFF, 0xFF00FF00FF00FF, 0, 0, 0, 0, 0, 2**64 - 1]
"""Hashes of pictures that are no copies of each other, by their number."""


def measured(source: str, hashes: list[int], sample_id: str = "", question: int = 0) -> Measured:
    sizes = [(10, 20)] * len(hashes)
    return Measured(
        source,
        "ocr",
        sample_id,
        Measures(sizes, sizes, 0, [Look(FAR[each], bytes(256)) for each in hashes], 7, question, 3, None),
    )


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 2)), max_size=12)
)
def test_duplicates_and_leaks_are_those_of_a_plain_count(rows: list[tuple[str, list[int], int]]) -> None:
    train = survey(measured(source, hashes, str(question), question) for source, hashes, question in rows)
    for source, found in train.items():
        own = [(tuple(hashes), question) for name, hashes, question in rows if name == source]
        assert (found.num_rows, found.num_duplicates) == (len(own), len(own) - len(set(own)))
        assert found.num_same_ids == len(own) - len({question for _, question in own})
        assert dict(found.figures(None))["rows"] == str(len(own))
    seen = {each for _, hashes, _ in rows for each in hashes}
    assert leaks(train, survey([measured("c", [9]), measured("d", [0, 9]), measured("d", [1])])) == {
        name: count for name, count in (("c", 0), ("d", (0 in seen) + (1 in seen))) if count
    }


@given(st.lists(st.integers(-1000, 1000), min_size=1))
def test_quartiles_are_values_that_occur_in_order(values: list[int]) -> None:
    found = quartiles(values)
    assert list(found) == sorted(found)
    assert set(found) <= set(values)
    assert (found[0], found[3]) == (min(values), max(values))
