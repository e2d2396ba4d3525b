"""Which implementation attention takes on CUDA where it may choose: by a table of measurements, else by formula.

The table, `attention.csv`, has a line a measured shape: operation, head dim, query heads a KV head, sequences a
prefix, prefix tokens, the faster implementation, and on which GPU and when. A shape takes the nearest line all of
whose sizes are within a factor of two. It is empty until a GPU has filled it (item 12 of `python -m benchmarks gpu`).

Formulas (T tokens, H query heads, D head dim, pairs: visible (query, key) pairs of a head):

    training    seconds = operations / rate + copied bytes / copy rate + launches;  operations = 14 D H pairs
    prefill     likewise, with 4 D H pairs
    decode      bytes: a prefix read once a group is never more than a prefix read once a sequence
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from torch import Tensor

from sip_engine.kernels._flash_attn import flash_line, why_not
from sip_engine.kernels._shared_prefix_cost import attention_cost
from sip_engine.kernels._shared_prefix_layout import RowLayout
from sip_engine.kernels.shared_prefix_attention import MAX_HEAD_DIM

TABLE = Path(__file__).resolve().with_name("attention.csv")
COLUMNS = ("operation", "head_dim", "ratio", "group", "prefix", "impl", "measured_on")
RATES = {"triton": 330e12, "flash 4": 540e12, "flash 2": 350e12}
"""bf16 operations a second, forward and backward together, on an H100. Estimates: ours was read from its code, line 4
has the published rate of the third (its Hopper kernels are that line's), line 2 is published for Hopper."""
COPY_BYTES_S, LAUNCH_S = 3.0e12, 5e-6
"""A device copy, measured; and a launch from Python, assumed. flash-attn takes about twelve more, for gathering."""

Operation = Literal["training", "prefill", "decode"]


@dataclass(frozen=True)
class Shape:
    """What decides. In training and prefill `group` is the number of suffixes of a row."""

    operation: Operation
    head_dim: int
    ratio: int
    """Query heads a KV head."""
    group: int
    """Sequences of a prefix."""
    prefix: int
    """Tokens."""

    def distance(self, other: Shape) -> float:
        """The largest factor between two sizes as a power of two; infinite for another operation or head dim."""
        if (self.operation, self.head_dim) != (other.operation, other.head_dim):
            return math.inf
        pairs = ((self.ratio, other.ratio), (self.group, other.group), (self.prefix, other.prefix))
        return max(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


@cache
def measured() -> tuple[tuple[Shape, str], ...]:
    """The lines of the table. ValueError, naming the line, if one cannot be used."""
    found = []
    with TABLE.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                sizes = (int(row[name]) for name in COLUMNS[1:5])
                impl = row["impl"]
                assert impl in ("triton", "triton_ungrouped", "flash")
                found.append((Shape(row["operation"], *sizes), impl))  # pyright: ignore[reportArgumentType]
            except (AssertionError, KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{TABLE}:{number}: a line is {','.join(COLUMNS)}, of numbers and names"
                ) from None
    return tuple(found)


def nearest(shape: Shape) -> str | None:
    """What was faster at the measured shape nearest to this one; None where none is within a factor of two."""
    near = min(measured(), key=lambda entry: shape.distance(entry[0]), default=None)
    return near[1] if near is not None and shape.distance(near[0]) <= 1 else None


def choose_decode(shape: Shape) -> Literal["triton", "triton_ungrouped"]:
    """One query a sequence: prefixes once a group, or once a sequence."""
    return "triton_ungrouped" if nearest(shape) == "triton_ungrouped" else "triton"


def choose_packed(
    operation: Literal["training", "prefill"], q: Tensor, num_kv_heads: int, layout: RowLayout
) -> Literal["triton", "flash"]:
    """A packed stream of queries `q` [T, H, D], on CUDA; looked up once a layout."""
    return layout.once(f"choice {operation}", lambda: _choose_packed(operation, q, num_kv_heads, layout))


def _choose_packed(
    operation: Literal["training", "prefill"], q: Tensor, num_kv_heads: int, layout: RowLayout
) -> Literal["triton", "flash"]:
    (num_tokens, num_heads, head_dim), dtype = q.shape, q.dtype
    group = max((len(suffixes) for suffixes in layout.suffix_lens), default=0)
    prefix = sum(layout.prefix_lens) // max(1, len(layout.prefix_lens))
    shape = Shape(operation, head_dim, num_heads // num_kv_heads, group, prefix)
    if why_not(shape.head_dim, dtype):
        return "triton"
    if shape.head_dim > MAX_HEAD_DIM and shape.operation == "training":
        return "flash"
    found = nearest(shape)
    if found == "triton" or found == "flash":
        return found
    pairs = attention_cost(layout, num_heads=1, head_dim=1).pairs
    products = 14 if shape.operation == "training" else 4
    operations = products * shape.head_dim * num_heads * pairs
    # flash-attn's second call works on copies of suffixes and prefixes, and its results are joined and added.
    gathered = (8 if shape.operation == "training" else 4) if shape.group else 0
    copied = gathered * num_tokens * num_heads * shape.head_dim * dtype.itemsize
    theirs = (
        operations / RATES[f"flash {flash_line()[0]}"]
        + copied / COPY_BYTES_S
        + 12 * LAUNCH_S * bool(shape.group)
    )
    return "flash" if theirs < operations / RATES["triton"] else "triton"
