"""Reading prefixes into their pages, a bounded number of tokens a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sip_engine.sampler.attention import PagedAttention
from sip_engine.sampler.decoder import Decoder
from sip_engine.sampler.transfer import upload


def prefill(
    decoder: Decoder,
    attention: PagedAttention,
    tables: np.ndarray,
    prefixes: Sequence[np.ndarray],
    most_tokens: int,
) -> Tensor:
    """Store prefixes in the pages of their `tables` rows [groups, blocks]; returns [groups, H], of the last tokens.

    What a pass keeps in memory grows with its tokens: at most `most_tokens`, or one longer prefix.
    """
    device, ends = decoder.weights.device, []
    lens = np.array([len(ids) for ids in prefixes], np.int32)
    for part in _parts(lens, most_tokens):
        attention.set_prefill(np.ascontiguousarray(tables[part]), lens[part])
        ids = upload(np.concatenate(prefixes[part]).astype(np.int64), device)
        positions = upload(np.concatenate([np.arange(n) for n in lens[part]]), device)
        hidden = decoder.forward(ids, positions, attention.prefill)
        last = lens[part].cumsum(dtype=np.int64) - 1
        ends.append(hidden.index_select(0, upload(last, device)))
    return torch.cat(ends)


def _parts(lens: np.ndarray, most_tokens: int) -> Iterator[slice]:
    first = total = 0
    for number, length in enumerate(lens.tolist()):
        if number > first and total + length > most_tokens:
            yield slice(first, number)
            first, total = number, 0
        total += length
    yield slice(first, len(lens))
