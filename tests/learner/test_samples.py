"""What preparing prompts costs one learner rank: real rows, tokenizer and images, with the digits' model."""

from typing import Any

import msgspec
import numpy as np
import pytest

from learner.learner import Learner
from learner.rank import LearnerRank, Samples
from tests.data.counted import count_costs
from tests.data.rows import MODEL, encoded, row, write_parquet
from tests.learner import runs, worlds
from vtriune.data.build import build_store
from vtriune.data.store import Store, StoreSet
from vtriune.messages import ScoredGroup

NUM_GROUPS = 4
SEEDS = range(1, 1 + NUM_GROUPS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("samples")
    rows = [row(number, images=[{"bytes": encoded(56, 84, number), "path": None}]) for number in range(NUM_GROUPS)]
    return build_store([write_parquet(folder / "rows.parquet", rows)], folder)


def learner_of(store: Store, freeze: tuple[str, ...]) -> Learner:
    config = worlds.config_with(
        model={"path": str(MODEL), "freeze": list(freeze)},
        data={"min_pixels": 784, "max_pixels": 25088, "max_prompt_tokens": 160},
        policy={"mode": "off_policy"},
    )
    source = LearnerRank(config, [str(store.folder)], rank=0, num_ranks=1)._source()
    return Learner(config, worlds.make_policy(MODEL, freeze=freeze), source)


def groups_of(learner: Learner, store: Store, first_id: int = 0) -> list[ScoredGroup]:
    """A group of each row, its prompt as the generator would have made it."""
    groups = []
    for number, seed in enumerate(SEEDS):
        ids = learner.prompts.source(store.ref(number), seed + first_id).prompt_ids
        group = worlds.scored_group(first_id + number, ids, [np.arange(7, 11), np.arange(9, 12)], [1.0, 0.0])
        lease = msgspec.structs.replace(group.group.lease, sample=store.ref(number), prompt_seed=seed + first_id)
        groups.append(msgspec.structs.replace(group, group=msgspec.structs.replace(group.group, lease=lease)))
    return groups


def train(learner: Learner, groups: list[ScoredGroup], **order: Any) -> None:
    for group in groups:
        learner.deliver(group)
    assert learner.train(runs.order_of(groups, **order)).metrics["loss"] != 0


@pytest.mark.parametrize("freeze", [("vit", "connector"), ("connector",)], ids=["frozen", "trained"])
def test_a_group_costs_a_rank_one_tokenization_one_decoding_and_one_row(
    store: Store, freeze: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = groups_of(learner_of(store, freeze), store)
    learner = learner_of(store, freeze)
    ids = [group.group.lease.group_id for group in groups]
    costs = count_costs(monkeypatch)
    # Two updates: the later one's log-probs are computed once ahead, once in its turn.
    train(learner, groups, updates=[ids[:2], ids[2:]], correction="decoupled")
    assert costs == dict.fromkeys(("tokenized", "decoded", "opened"), NUM_GROUPS)


def test_an_image_whose_features_are_at_hand_is_not_decoded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(store, ("vit", "connector"))
    first, second = groups_of(learner, store), groups_of(learner, store, first_id=NUM_GROUPS)
    train(learner, first)
    costs = count_costs(monkeypatch)
    # The same rows with other sentences of the prompt pool: new ids, the same images.
    train(learner, second)
    assert (costs["tokenized"], costs["decoded"]) == (NUM_GROUPS, 0)


def test_prompts_are_kept_within_their_memory_least_recently_used_dropped_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = learner_of(store, ("connector",)).prompts.source(store.ref(0), 1)
    samples = Samples(StoreSet([store]), prompt.preprocessor, 2 * prompt.num_bytes + 2_000)
    costs = count_costs(monkeypatch)
    first, second = samples(store.ref(0), 1), samples(store.ref(1), 1)
    assert (samples(store.ref(0), 1), samples(store.ref(1), 1), samples(store.ref(0), 1)) == (first, second, first)
    assert costs["opened"] == 2
    samples(store.ref(2), 1)
    assert samples(store.ref(0), 1) is first
    assert samples(store.ref(1), 1) is not second
    assert costs["opened"] == 4
