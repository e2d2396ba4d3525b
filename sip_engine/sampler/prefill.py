"""Reading prefixes into their pages, a bounded number of tokens a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sip_engine.kernels._transfer import upload
from sip_engine.sampler.attention import PagedAttention
from sip_engine.sampler.decoder import Decoder


def prefill(
    decoder: Decoder,
    attention: PagedAttention,
    tables: np.ndarray,
    prefixes: Sequence[np.ndarray],
    most_tokens: int,
) -> Tensor:
    """Store prefixes in the pages of their `tables` rows [groups, blocks]; returns [groups, H], of the last tokens.

    What a pass keeps in memory grows with its tokens: at most `most_tokens`. A longer prefix takes several passes, of
    which each attends to the pages that the ones before have filled.
    """
    device, ends = decoder.weights.device, []
    lens = np.array([len(ids) for ids in prefixes], np.int32)
    for part, begin, end in _passes(lens, most_tokens):
        new = np.minimum(lens[part], end) - begin
        attention.set_prefill(np.ascontiguousarray(tables[part]), new, np.full_like(new, begin))
        ids = upload(np.concatenate([ids[begin:end] for ids in prefixes[part]]).astype(np.int64), device)
        positions = upload(np.concatenate([np.arange(begin, begin + n) for n in new]), device)
        hidden = decoder.forward(ids, positions, attention.prefill)
        if end >= lens[part].max():
            ends.append(hidden.index_select(0, upload(new.cumsum(dtype=np.int64) - 1, device)))
    return torch.cat(ends)


def _passes(lens: np.ndarray, most_tokens: int) -> Iterator[tuple[slice, int, int]]:
    """Which prefixes a pass reads, and from which of their tokens to which: several whole ones, or a part of one."""
    for part in _parts(lens, most_tokens):
        longest = int(lens[part].max())
        for begin in range(0, longest, most_tokens) if part.stop - part.start == 1 else (0,):
            yield part, begin, min(begin + most_tokens, longest)


def _parts(lens: np.ndarray, most_tokens: int) -> Iterator[slice]:
    first = total = 0
    for number, length in enumerate(lens.tolist()):
        if number > first and total + length > most_tokens:
            yield slice(first, number)
            first, total = number, 0
        total += length
    yield slice(first, len(lens))
