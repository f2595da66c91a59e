"""Counts of what preparing a prompt costs: for the tests of generator and learner, which each should pay it once."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from PIL import PngImagePlugin
from transformers import PreTrainedTokenizerBase

from vtriune.data.store import Store


def count_costs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """From now on: `tokenized` texts, `decoded` PNG images, `opened` rows of a store."""
    counts: Counter[str] = Counter()

    def counted(name: str, owner: type, method: str) -> None:
        real: Callable[..., Any] = getattr(owner, method)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, method, counting)

    counted("tokenized", PreTrainedTokenizerBase, "__call__")
    counted("decoded", PngImagePlugin.PngImageFile, "load_prepare")
    counted("opened", Store, "_fields")
    return counts
