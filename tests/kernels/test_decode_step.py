"""Placing the tokens of a decode step and moving on, in every implementation, against plain loops."""

from __future__ import annotations

import interpreter  # noqa: F401  # before Triton
import numpy as np
import pytest
import torch
from interpreter import DEVICE

from sip_engine.kernels.decode_step import advance, next_slots

IMPLS = ["reference", "triton"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("page_size", [1, 4, 5])
def test_slots_are_those_of_the_last_tokens(impl: str, page_size: int) -> None:
    rng = np.random.default_rng(page_size)
    tables = rng.integers(0, 99, (300, 3)).astype(np.int32)
    lens = rng.integers(0, 3 * page_size + 2, 300).astype(
        np.int32
    )  # 0 is an empty row; the largest has no page
    tables[::7, 1:] = -1
    want = []
    for table, length in zip(tables.tolist(), lens.tolist(), strict=True):
        block, offset = divmod(length - 1, page_size)
        page = table[block] if 0 <= block < 3 else -1
        want.append(page * page_size + offset if page >= 0 else -1)
    assert -1 in want and max(want) > page_size
    rows, lengths = torch.from_numpy(tables).to(DEVICE), torch.from_numpy(lens).to(DEVICE)
    got = next_slots(rows, lengths, page_size, impl=impl)  # type: ignore[arg-type]
    assert got.tolist() == want


@pytest.mark.parametrize("impl", IMPLS)
def test_a_step_moves_on(impl: str) -> None:
    """Over more steps than the history holds: it keeps the last ones."""
    rng, rows, kept = np.random.default_rng(0), 260, 3
    tokens, positions, draws, counts = (torch.zeros(rows, dtype=torch.int64, device=DEVICE) for _ in range(4))
    positions += 7
    lens = torch.arange(rows, device=DEVICE).to(torch.int32) % 2
    history = torch.zeros(kept, 2, rows, dtype=torch.int32, device=DEVICE)
    drawn = []
    for _ in range(kept + 1):
        ids, logprobs = rng.integers(-1, 2**31, rows), -rng.random(rows, np.float32)
        drawn.append((ids, logprobs))
        state = (tokens, positions, draws, lens, counts, history)
        advance(torch.from_numpy(ids).to(DEVICE), torch.from_numpy(logprobs).to(DEVICE), *state, impl=impl)  # type: ignore[arg-type]
    assert tokens.tolist() == drawn[-1][0].tolist()
    assert (
        positions.tolist() == [7 + kept + 1] * rows and draws.tolist() == counts.tolist() == [kept + 1] * rows
    )
    assert lens.tolist() == [(kept + 2) * (row % 2) for row in range(rows)]
    for slot, (ids, logprobs) in zip((1, 2, 0), drawn[1:], strict=True):
        assert history[slot, 0].tolist() == ids.tolist()
        assert history[slot, 1].cpu().numpy().view(np.float32).tolist() == logprobs.tolist()


def test_shapes_that_disagree_are_refused() -> None:
    tables, lens = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="lens has shape"):
        next_slots(tables, lens, 4)
