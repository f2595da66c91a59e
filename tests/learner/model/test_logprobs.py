"""Chunked log-probs and entropies against torch's own on full logits."""

import weakref
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.model.logprobs import score_tokens


def full(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float, blocked: list[int]
) -> tuple:
    logits = (hidden @ weight.T) / temperature
    logits = logits.index_fill(-1, torch.tensor(blocked, dtype=torch.int64), float("-inf"))
    distribution = torch.distributions.Categorical(logits=logits.clamp(min=-1e30))
    return distribution.log_prob(targets), distribution.entropy()


@given(
    seed=st.integers(0, 1000), num=st.integers(1, 20), chunk_rows=st.integers(1, 25), temperature=st.sampled_from([0.5, 1.0, 1.7]),
    blocked=st.sampled_from([[], [2], [0, 3]]), weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_full_logits_for_any_chunk(
    seed: int, num: int, chunk_rows: int, temperature: float, blocked: list[int], weights: tuple[float, float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocab = 11
    hidden = torch.randn(num, 5, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, 5, generator=generator, requires_grad=True)
    allowed = torch.tensor([i for i in range(vocab) if i not in blocked])
    targets = allowed[torch.randint(len(allowed), (num,), generator=generator)]
    ours = score_tokens(
        hidden, weight, targets, temperature=temperature, blocked_ids=torch.tensor(blocked, dtype=torch.int64),
        chunk_bytes=4 * vocab * chunk_rows,
    )  # fmt: skip
    expected = full(hidden, weight, targets, temperature, blocked)
    slopes = [torch.randn(num, generator=generator) * scale for scale in weights]
    ours_total = sum((value * slope).sum() for value, slope in zip(ours, slopes, strict=True))
    expected_total = sum((value * slope).sum() for value, slope in zip(expected, slopes, strict=True))
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(ours_total, [hidden, weight])
    for gradient, other in zip(gradients, torch.autograd.grad(expected_total, [hidden, weight]), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_one_of_the_two_outputs_may_go_unused() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(7, 3, requires_grad=True)
    scores = score_tokens(hidden, weight, torch.tensor([0, 1, 2, 3]), chunk_bytes=4 * 7)
    expected = torch.log_softmax(hidden @ weight.T, -1)[torch.arange(4), torch.arange(4)]
    (gradient,) = torch.autograd.grad(scores.logprobs.sum(), [hidden], retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), [hidden])[0], rtol=1e-4, atol=1e-6)


def test_a_frozen_output_layer_gets_no_gradient_and_hidden_states_do() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(7, 3)
    score_tokens(hidden, weight, torch.tensor([0, 1, 2, 3])).logprobs.sum().backward()
    assert weight.grad is None
    assert float(hidden.grad.norm()) > 0


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all storages made under it, and its peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def test_the_peak_is_a_few_chunks_and_an_eighth_of_full_logits_at_most() -> None:
    vocab, num, width, chunk = 20_000, 1024, 8, 2 << 20
    hidden, weight = torch.randn(num, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (num,))
    with LiveBytes() as memory:
        scores = score_tokens(hidden, weight, targets, chunk_bytes=chunk)
        (scores.logprobs.sum() + scores.entropy.sum()).backward()
    assert 2 * chunk < memory.peak < 4 * vocab * num / 8
