"""What the engine is handed of a prompt, and what it costs to make; the core is handwritten, everything before it is real."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engine import engine as module
from actors.engine.engine import Engine
from tests.actors.engine.test_loop import FakeCore
from tests.actors.worlds import preprocessor_of, settings
from tests.data.counted import count_costs
from tests.data.rows import MODEL, encoded, row, write_parquet
from vtriune.data.build import build_store
from vtriune.data.store import StoreSet
from vtriune.messages import Lease, Sampling

CELL_PX = 28


class Template(int):
    """Tokens to sample, as the fake core wants it, and what the engine reads of vLLM's request."""

    prompt_token_ids: list[int]


class RenderingCore(FakeCore):
    """Expands image pads as vLLM does: one per merged token."""

    max_model_len = 256

    def __init__(self, image_token_id: int) -> None:
        super().__init__()
        self.image_token_id = image_token_id
        self.rendered: list[tuple[list[int], list[tuple[int, int]]]] = []

    def expectation(self, folder: str) -> None:
        """Nothing is published here."""

    def limit_threads(self) -> None:
        """There is no model."""

    def close(self) -> None:
        """There is nothing to release."""

    def render(self, prompt_ids: Any, images: Any, sampling: Sampling) -> Template:
        sizes = [image.size for image in images]
        self.rendered.append((list(prompt_ids), sizes))
        counts = iter([width * height // CELL_PX**2 for width, height in sizes])
        template = Template(sampling.max_tokens)
        template.prompt_token_ids = [
            token
            for written in prompt_ids
            for token in [written] * (next(counts) if written == self.image_token_id else 1)
        ]
        return template


async def test_a_group_costs_the_generator_one_tokenization_one_decoding_and_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [{"bytes": encoded(*size), "path": None} for size in ((60, 90), (84, 28))]
    prompt = [{"role": "user", "content": "<image>What is <image>?"}]
    store = build_store([write_parquet(tmp_path / "a.parquet", [row(0, images=images, prompt=prompt)])], tmp_path)
    config = settings(MODEL)
    preprocessor = preprocessor_of(config)
    core = RenderingCore(preprocessor.image_token_id)
    monkeypatch.setattr(module, "_core", lambda *_: core)
    engine = Engine(config, preprocessor, StoreSet([store]))
    lease = Lease(1, 0, store.ref(0), store.header(0), 3, Sampling(max_tokens=4), prompt_seed=5)
    costs = count_costs(monkeypatch)
    try:
        group = await engine.generate(lease)
    finally:
        await engine.close()
    assert costs == {"tokenized": 1, "decoded": 2, "opened": 1}
    ((ids, sizes),) = core.rendered
    assert (ids.count(preprocessor.image_token_id), sizes) == (2, [(56, 84), (84, 28)])
    assert np.count_nonzero(group.prompt_ids == preprocessor.image_token_id) == 6 + 3
    assert len(group.prompt_ids) == len(ids) + 6 + 3 - 2
