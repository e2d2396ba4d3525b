"""Prompts read by a causal LM, each in one pass: how probable are some options after some of its tokens?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from sip_engine.data.tokenizer import Tokenizer
from sip_engine.policy.packing import split_by_tokens
from sip_engine.policy.rows import Row
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.types import Labels


@dataclass(frozen=True)
class OptionQuery:
    """A prompt [tokens] and what is to be answered: the `options` [n] (token ids) after each of its `positions` [m].

    Readings of one `group` begin with the same text; it is read once for all that weigh the same options. Where
    `first` is given and those alike in it share more, they are read together instead.
    """

    ids: np.ndarray
    options: np.ndarray
    positions: np.ndarray
    group: str
    first: str = ""


@dataclass(frozen=True)
class OptionProbs:
    """`probs` [positions, options] float64 sum to 1 over the options; `num_tokens` were read for them."""

    probs: Tensor
    num_tokens: int


def option_probs(policy: FrozenPolicy, queries: Sequence[OptionQuery]) -> list[OptionProbs]:
    """The options' probabilities against each other, for each query, in order. Computed in float64."""
    groups: dict[tuple[str, bytes], list[int]] = {}
    for number, query in enumerate(queries):
        groups.setdefault((query.group, query.options.tobytes()), []).append(number)
    parts = [
        part
        for whole in groups.values()
        for group in _cheaper(queries, whole)
        for part in _fitting(queries, group, policy.micro_batch_tokens)
    ]
    shared = [_num_shared([queries[n] for n in part]) for part in parts]
    rows = [_row([queries[n] for n in part], num) for part, num in zip(parts, shared, strict=True)]
    batches = policy.micro_batches(rows) if rows else []
    scored = zip(batches, policy.score(batches), strict=True)
    values = (one for batch, flat in scored for one in flat.double().cpu().split(list(batch.target_lens)))
    found: dict[int, OptionProbs] = {}
    for part, num_shared in zip(parts, shared, strict=True):
        for number in part:
            one = queries[number]
            probs = torch.softmax(next(values).view(len(one.positions), len(one.options)), dim=1)
            found[number] = OptionProbs(probs, round(num_shared / len(part)) + len(one.ids) - num_shared)
    return [found[number] for number in range(len(queries))]


def first_tokens(tokenizer: Tokenizer, words: Iterable[str]) -> np.ndarray:
    """[n] int64: the tokens that words to be answered begin with, which must differ."""
    ids = np.array([tokenizer.encode(word)[0] for word in words], np.int64)
    assert len(set(ids.tolist())) == len(ids), f"words {list(words)} begin with the same token"
    return ids


def _row(part: Sequence[OptionQuery], shared: int) -> Row:
    labels = tuple(Labels.every(one.positions - shared, one.options) for one in part)
    return Row(part[0].ids[:shared], tuple(one.ids[shared:] for one in part), labels)


def _fitting(queries: Sequence[OptionQuery], group: list[int], max_tokens: int) -> list[list[int]]:
    """A group in parts whose tokens a micro-batch holds: what is one row is never cut later."""
    shared = _num_shared([queries[number] for number in group])
    own = [len(queries[number].ids) - shared for number in group]
    return [[group[i] for i in part] for part in split_by_tokens(own, max(1, max_tokens - shared))]


def _cheaper(queries: Sequence[OptionQuery], group: list[int]) -> list[list[int]]:
    """A group as it is, or cut by `first`, whichever leaves fewer tokens to read.

    Where one candidate is compared with many, prefix and first continuation are read once for all of them.
    """
    by_first: dict[str, list[int]] = {}
    for number in group:
        by_first.setdefault(queries[number].first, []).append(number)
    parts = list(by_first.values())
    if len(parts) == 1:
        return parts
    return parts if sum(_num_tokens(queries, p) for p in parts) < _num_tokens(queries, group) else [group]


def _num_tokens(queries: Sequence[OptionQuery], group: Sequence[int]) -> int:
    shared = _num_shared([queries[n] for n in group])
    return shared + sum(len(queries[n].ids) - shared for n in group)


def _num_shared(group: Sequence[OptionQuery]) -> int:
    """Tokens that all prompts begin with, before the first place of any."""
    most = min(int(one.positions.min()) for one in group)
    columns = zip(*(one.ids[:most].tolist() for one in group), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
