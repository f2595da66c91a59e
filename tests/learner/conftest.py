"""Models are written once per session; a test that changes weights makes its own policy."""

from pathlib import Path

import pytest
import torch

from tests.learner import worlds


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per family, and an untied Qwen2.5-VL."""
    base = tmp_path_factory.mktemp("models")
    folders = {kind: worlds.write_model(base / kind, kind) for kind in ("qwen2_5_vl", "qwen3_vl", "qwen3")}
    folders["untied"] = worlds.write_model(base / "untied", tied=False)
    return folders
