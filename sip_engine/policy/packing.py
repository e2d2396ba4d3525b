"""Packing: a prefix and its suffixes as one row, rows as one token stream, streams as micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sip_engine.kernels._transfer import place
from sip_engine.kernels.shared_prefix_attention import RowLayout
from sip_engine.policy.rows import Row


@dataclass(frozen=True)
class PackedRows:
    """A micro-batch: rows laid end to end, without padding.

    Attributes:
        tokens: [T] int64, the stream; `layout` says where rows and suffixes begin.
        scored: [num_targets] int64, stream index whose hidden state predicts the target.
        targets: [num_targets] int64, the suffix tokens (or labels) in row, suffix, token order.
        target_lens: scored tokens of each suffix, in order.
        sampled: [num_targets] float32, log-prob of each target under the policy that sampled it, NaN where
            it was not sampled.
        advantages: [num_targets] float32, 0 where it has none.
        weights: [num_targets] float32, 1 where it has none.
        document_weights: [num_targets] float32, factors of the documents' next-token term, 0 elsewhere.
        document_suffixes: which suffixes of the micro-batch are documents' own, rising.
        rotary: cosine and sine of each token's angles, [T, D / 2] float32; the model's forward pass sets them.

    Tensors of such values are None where no row of the micro-batch has any; see `Row`.
    """

    layout: RowLayout
    tokens: Tensor
    scored: Tensor
    targets: Tensor
    target_lens: tuple[int, ...]
    sampled: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    document_weights: Tensor | None = None
    document_suffixes: tuple[int, ...] = ()
    rotary: tuple[Tensor, ...] | None = None
    # Megatron asks its packing parameters for this; any value but "thd" leaves the tensors to us.
    qkv_format: str = "shared_prefix"

    @cached_property
    def suffix_starts(self) -> Tensor:
        """[num_suffixes + 1] int64: the first target of each suffix, then the number of targets."""
        ends = np.cumsum([0, *self.target_lens], dtype=np.int64)
        return place(torch.from_numpy(ends), self.tokens.device)

    @cached_property
    def suffix_of_target(self) -> Tensor:
        """[num_targets] int64: which suffix of the micro-batch each target belongs to."""
        lens = torch.tensor(self.target_lens)
        return place(torch.repeat_interleave(torch.arange(len(lens)), lens), self.tokens.device)

    def sum_by_suffix(self, values: Tensor) -> Tensor:
        """[num_targets] -> [num_suffixes]: sums over each suffix's tokens, differentiable."""
        zeros = values.new_zeros(len(self.target_lens))
        return zeros.index_add(0, self.suffix_of_target, values)

    def without_documents(self) -> tuple[PackedRows, Tensor | None]:
        """The same stream with the targets that an objective sees, and which of all targets these are.

        The second is int64 [num_kept], or None where all are kept: then the first is this micro-batch itself.
        """
        if not self.document_suffixes:
            return self, None
        seen = np.ones(len(self.target_lens), bool)
        seen[list(self.document_suffixes)] = False
        kept = place(torch.from_numpy(np.flatnonzero(np.repeat(seen, self.target_lens))), self.tokens.device)
        lens = tuple(n for n, is_seen in zip(self.target_lens, seen, strict=True) if is_seen)

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[kept]

        shown = replace(
            self,
            scored=self.scored[kept],
            targets=self.targets[kept],
            target_lens=lens,
            sampled=pick(self.sampled),
            advantages=pick(self.advantages),
            weights=pick(self.weights),
            document_weights=None,
            document_suffixes=(),
        )
        return shown, kept


def pack_rows(rows: Sequence[Row], device: torch.device, *, multiple: int = 1) -> PackedRows:
    """Lay rows end to end.

    Args:
        rows: at least one, none of them empty.
        multiple: the stream's length is padded to a multiple of this (sequence parallelism needs the
            tensor-parallel size) by a row of zeros that nothing scores.
    """
    padding = -sum(row.num_tokens for row in rows) % multiple
    padded = [*rows, Row(np.zeros(padding, np.int32), ())] if padding else list(rows)
    tokens, scored, targets, target_lens = [], [], [], []
    start = 0
    for row in padded:
        tokens.append(row.prefix)
        last_of_prefix = start + len(row.prefix) - 1
        start += len(row.prefix)
        for number, suffix in enumerate(row.suffixes):
            if row.labels:
                scored.append(start + row.labels[number].positions)
                targets.append(row.labels[number].ids)
            else:
                before = np.arange(start - 1, start + len(suffix) - 1)
                skip = 0 if len(row.prefix) else 1
                if not skip:
                    before[0] = last_of_prefix
                scored.append(before[skip:])
                targets.append(suffix[skip:])
            tokens.append(suffix)
            start += len(suffix)
        target_lens += row.num_scored
    layout = RowLayout(
        tuple(len(row.prefix) for row in padded),
        tuple(tuple(len(s) for s in row.suffixes) for row in padded),
        device,
    )

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return place(torch.from_numpy(np.concatenate(parts).astype(np.int64)), device)

    return PackedRows(
        layout,
        tensor(tokens),
        tensor(scored),
        tensor(targets),
        tuple(target_lens),
        sampled=_side_values(padded, "sampled", float("nan"), device),
        advantages=_side_values(padded, "advantages", 0.0, device),
        weights=_side_values(padded, "weights", 1.0, device),
        **_documents(padded, device),
    )


def _documents(rows: Sequence[Row], device: torch.device) -> dict[str, Any]:
    """`document_weights` and `document_suffixes` of a micro-batch; nothing where no row has its document's suffix."""
    if not any(row.document_weight for row in rows):
        return {}
    suffixes, weights, end = [], [], 0
    for row in rows:
        factors = np.zeros(len(row.suffixes), np.float32)
        end += len(row.suffixes)
        if row.document_weight:
            factors[-1] = row.document_weight
            suffixes.append(end - 1)
        weights.append(np.repeat(factors, np.asarray(row.num_scored, np.int64)))
    values = place(torch.from_numpy(np.concatenate(weights)), device)
    return {"document_weights": values, "document_suffixes": tuple(suffixes)}


def _side_values(rows: Sequence[Row], name: str, missing: float, device: torch.device) -> Tensor | None:
    """[num_targets] float32, `missing` where a row has none; None where all have none."""
    if all(value is None for row in rows for value in getattr(row, name)):
        return None
    values = np.concatenate([row.side_values(name, missing) for row in rows])
    return place(torch.from_numpy(values), device)


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the rows of each micro-batch: consecutive, as few as `max_tokens` allows, then balanced.

    Of all ways to cut the rows into that many, one whose longest micro-batch is shortest. A row longer than
    `max_tokens` gets a micro-batch of its own.
    """
    num_batches = len(_greedy_split(lengths, max_tokens))
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if len(_greedy_split(lengths, middle)) <= num_batches else (middle + 1, high)
        )
    return _greedy_split(lengths, high)


def _greedy_split(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Consecutive rows, each micro-batch filled before the next is begun."""
    groups: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(index)
        room -= length
    return groups
