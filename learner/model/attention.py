"""Shared-prefix attention over a pack, behind transformers' attention interface: `cpu` kernel and `flex` (CUDA).

`register()` adds both to transformers' table; the model's blocks stay transformers' own. `learner.model.policy` makes one
`Blocks` per pack and hands it to every layer as the keyword argument `blocks`.

CPU: three families of dense attention calls, each batched over pieces or completions of similar size and run by torch's flash
kernel, so no score matrix is kept and no prompt key is copied per completion:
  prompts        prompt rows, causal among themselves;
  answers→prompt all completion rows of a piece, over the keys of its prompt, nothing masked but padding;
  completions    each completion, causal over itself.
A completion row's two parts are merged by their log-sum-exp: o = Σ_k e^{lse_k} o_k / Σ_k e^{lse_k}. The flash backward
takes (o, lse) of the whole row for each part (probabilities are e^{s - lse}, the correction term is do·o), so running it per part with
the merged o and lse gives the exact gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from learner.model.packing import Pack
from vtriune.torchvision_schemas import define_missing_schemas

CPU = "vtriune_cpu"
FLEX = "vtriune_flex"

_F = TypeVar("_F", bound=Callable[..., object])
_uncompiled: Callable[[_F], _F] = torch.compiler.disable

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One batched attention call: b blocks of at most L query rows over at most K key rows."""

    queries: Tensor
    """int64 (b·L,): packed rows; padding repeats a row of the same block, so its numbers stay finite"""
    padding: Tensor | None
    """bool (b·L, 1, 1): query rows to be ignored; None when there are none"""
    kept: Tensor | None
    """int64: positions of the real rows in `queries`; None when all are"""
    keys: Tensor
    """int64 (b·K,): packed rows"""
    key_mask: Tensor | None
    """float (b, 1, 1, K): 0 or -inf; None when no key is padding"""
    num_blocks: int
    is_causal: bool


class Blocks:
    """The block structure of one pack, as each kernel wants it. Tensors live on `device`; made once per pack."""

    def __init__(self, pack: Pack, device: torch.device):
        self._pack, self._device = pack, device

    @cached_property
    def whole(self) -> list[AttentionCall]:
        """Calls whose result is final: prompt rows."""
        return [self._call(spans) for spans in _buckets(self._pack.prompt_spans)]

    @cached_property
    def halves(self) -> tuple[list[AttentionCall], list[AttentionCall]]:
        """Calls that together make the completion rows: over the prompt, over themselves. Empty for one-token completions."""
        pack = self._pack
        used = pack.answer_spans[:, 1] > 0
        pairs = np.concatenate([pack.answer_spans[used], pack.prompt_spans[used]], axis=1)
        reads = [self._call(spans[:, :2], spans[:, 2:]) for spans in _buckets(pairs)]
        return reads, [self._call(spans) for spans in _buckets(pack.segment_spans[pack.segment_spans[:, 1] > 0])]

    @cached_property
    def answer_rows(self) -> Tensor:
        """int64: the completion rows of the pack, the rows that `halves` cover."""
        spans = self._pack.answer_spans
        return self._tensor(np.concatenate([np.arange(first, first + rows) for first, rows in spans]))

    @cached_property
    def mask(self) -> BlockMask:
        """The same structure for FlexAttention, rows padded by the kernel."""
        group, segment = (self._tensor(label) for label in self._pack.labels())

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            shared = (segment[key] < 0) | (segment[key] == segment[query])
            return (key <= query) & (group[key] == group[query]) & shared

        rows = self._pack.num_rows
        return create_block_mask(sees, None, None, rows, rows, device=self._device)

    def prepared(self, kernel: str) -> "Blocks":
        """This, with all that `kernel` reads made now: on first use it would break a compiled block's graph."""
        _ = self.mask if kernel == FLEX else (self.whole, self.halves, self.answer_rows)
        return self

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _call(self, query_spans: np.ndarray, key_spans: np.ndarray | None = None) -> AttentionCall:
        """Each span of queries over its span of keys, or without those causally over itself."""
        rows, real = _padded(query_spans)
        full = bool(real.all())
        queries = keys = self._tensor(rows.reshape(-1))
        mask = None
        if key_spans is not None:
            key_rows, key_real = _padded(key_spans)
            keys = self._tensor(key_rows.reshape(-1))
            if not key_real.all():
                mask = self._tensor(np.where(key_real, np.float32(0), np.float32(-np.inf))[:, None, None, :])
        return AttentionCall(
            queries=queries,
            padding=None if full else self._tensor(~real.reshape(-1, 1, 1)),
            kept=None if full else self._tensor(np.flatnonzero(real)),
            keys=keys,
            key_mask=mask,
            num_blocks=len(query_spans),
            is_causal=key_spans is None,
        )


def _padded(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spans (b, 2) → rows int64 (b, L) with padding clamped to each span's last row, and which are real, bool (b, L)."""
    offsets = np.arange(spans[:, 1].max())
    real = offsets < spans[:, 1:]
    return spans[:, :1] + np.minimum(offsets, spans[:, 1:] - 1), real


def _buckets(spans: np.ndarray) -> list[np.ndarray]:
    """Split spans into buckets padded to their longest, so that padding costs less than the calls it saves.

    Column 1 (and 3, when present) are lengths. Sorted by the first, a bucket is closed when the next span would be padded
    by more than a quarter and by more than 16 rows.
    """
    buckets: list[list[np.ndarray]] = []
    longest = 0
    for span in spans[np.argsort(-spans[:, 1], kind="stable")]:
        if not buckets or longest - span[1] > max(16, longest // 4):
            buckets.append([])
            longest = span[1]
        buckets[-1].append(span)
    return [np.stack(bucket) for bucket in buckets]


def register() -> None:
    """Add both kernels to transformers' attention table; idempotent."""
    define_missing_schemas()
    from transformers import AttentionInterface

    # Dense calls over lists of rows leave a compiler nothing to fuse; traced, they are twenty graphs of a kernel or two each.
    AttentionInterface.register(CPU, _uncompiled(_interface(_cpu)))
    AttentionInterface.register(FLEX, _interface(_flex))


Kernel = Callable[[Tensor, Tensor, Tensor, float, Blocks], Tensor]
"""query (1, H, N, D), key and value (1, H_kv, N, D), scale, blocks → (1, N, H, D)"""


def _interface(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """`kernel` under the signature that transformers' decoder layers call."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: object,
        scaling: float,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        return kernel(query, key, value, scaling, rest["blocks"]), None

    return attend


def _cpu(query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: Blocks) -> Tensor:
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    apply: Callable[..., Tensor] = _SharedPrefix.apply
    return apply(*rows, scale, blocks)[None]


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    # Only the compiled kernel is a fused one. Packs differ in length: dynamic shapes avoid one compilation per length.
    return torch.compile(flex_attention, dynamic=True)


# The oracle on a CPU. Inductor's C++ for it does not compile with dynamic shapes. (`Any`: it can return more than a tensor.)
_eager_flex: Callable[..., Any] = _uncompiled(flex_attention)


def _flex(query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: Blocks) -> Tensor:
    kernel = _compiled_flex() if query.is_cuda else _eager_flex
    out: Tensor = kernel(query, key, value, block_mask=blocks.mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


class _SharedPrefix(torch.autograd.Function):
    """query (N, H, D), key and value (N, H_kv, D) → (N, H, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: Blocks) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = torch.zeros_like(query)
        lse = query.new_zeros(query.shape[:2])
        for call in blocks.whole:
            _scatter(call, _forward(call, query, key, value, scale), out, lse)
        reads, selves = blocks.halves
        if reads:
            other, other_lse = torch.zeros_like(out), torch.zeros_like(lse)
            for call in reads:
                _scatter(call, _forward(call, query, key, value, scale), out, lse)
            for call in selves:
                _scatter(call, _forward(call, query, key, value, scale), other, other_lse)
            _merge(blocks.answer_rows, out, lse, other, other_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.blocks = scale, blocks
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        into = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        reads, selves = ctx.blocks.halves
        for call in (*ctx.blocks.whole, *reads, *selves):
            _backward(call, (query, key, value, out, lse, grad), ctx.scale, into)
        return (*into, None, None)


def _heads_first(rows: Tensor, index: Tensor, num_blocks: int, num_heads: int) -> Tensor:
    """Rows (N, H_kv, D) gathered to (b, H, L, D); key heads are repeated to the query's number of heads."""
    gathered = rows.index_select(0, index)
    repeats = num_heads // rows.shape[1]
    if repeats > 1:
        gathered = gathered.repeat_interleave(repeats, dim=1)
    return gathered.view(num_blocks, -1, num_heads, rows.shape[2]).transpose(1, 2)


def _inputs(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    rows = ((query, call.queries), (key, call.keys), (value, call.keys))
    return [_heads_first(tensor, index, call.num_blocks, query.shape[1]) for tensor, index in rows]


def _forward(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(b·L, H, D) and log-sum-exp (b·L, H)."""
    out, lse = _flash(*_inputs(call, query, key, value), 0.0, call.is_causal, attn_mask=call.key_mask, scale=scale)
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def _scatter(call: AttentionCall, result: tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> None:
    rows = call.queries if call.kept is None else call.queries.index_select(0, call.kept)
    for part, whole in zip(result, (out, lse), strict=True):
        whole.index_copy_(0, rows, part if call.kept is None else part.index_select(0, call.kept))


def _merge(rows: Tensor, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Combine two partial softmaxes of `rows` in place into `out`, `lse`."""
    first, second = lse.index_select(0, rows), other_lse.index_select(0, rows)
    total = torch.logaddexp(first, second)
    share = torch.exp(second - total).unsqueeze(-1)
    out.index_copy_(0, rows, torch.lerp(out.index_select(0, rows), other.index_select(0, rows), share.to(out.dtype)))
    lse.index_copy_(0, rows, total)


def _backward(call: AttentionCall, tensors: Sequence[Tensor], scale: float, into: Sequence[Tensor]) -> None:
    """Add the call's share of the gradients of query, key and value to `into`."""
    query, key, value, out, lse, grad = tensors
    blocks, heads = call.num_blocks, query.shape[1]
    grad_rows = grad.index_select(0, call.queries)
    if call.padding is not None:
        grad_rows.masked_fill_(call.padding, 0)
    parts = _flash_backward(
        grad_rows.view(blocks, -1, heads, query.shape[2]).transpose(1, 2),
        *_inputs(call, query, key, value),
        _heads_first(out, call.queries, blocks, heads),
        lse.index_select(0, call.queries).view(blocks, -1, heads).transpose(1, 2),
        0.0,
        call.is_causal,
        attn_mask=call.key_mask,
        scale=scale,
    )
    for part, target, rows in zip(parts, into, (call.queries, call.keys, call.keys), strict=True):
        flat = part.transpose(1, 2).flatten(0, 1)
        if target.shape[1] != heads:
            flat = flat.view(len(flat), target.shape[1], -1, flat.shape[2]).sum(2)
        target.index_add_(0, rows, flat)
