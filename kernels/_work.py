"""Bytes and operations of every kernel at the reference shapes, for the compile report and the GPU benchmark.

The reference is a Llama of 1.4 B parameters (hidden 2048 in heads of D, feed-forward 5632, vocabulary 32,000) that
decodes B = 1024 sequences, G = 16 of each prefix of P = 1024 tokens, 64 suffix tokens in; prefills and trains 16,384
tokens; and scores 16,384. A tile of M query rows stands for M / G query heads a KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from sip_engine.kernels._predict import Work


class Case(Protocol):
    """What is read of a `CompileCase` of the compile report."""

    @property
    def kernel(self) -> Any: ...
    @property
    def signature(self) -> dict[str, str]: ...
    @property
    def constexprs(self) -> dict[str, Any]: ...
    @property
    def num_stages(self) -> int: ...


B, G, P, S, SEEN = 1024, 16, 1024, 128, 64
HIDDEN, FFN, VOCAB, TOKENS, CHUNK = 2048, 5632, 32_000, 16_384, 8192
SOFTMAX_OPS = 9
"""A score: scale, compare, select, maximum, subtract, sum, round, and its share of rescaling."""
PHILOX_OPS = 45
"""A number: a quarter of ten rounds of two wide products and two xors, and its conversion."""


def _bytes_of(case: Case, argument: str) -> int:
    kind = case.signature[argument].split(":")[0]
    return {"*fp8e4nv": 1, "*bf16": 2, "*fp16": 2, "*fp32": 4, "*i8": 1, "*i32": 4, "*i64": 8}[kind]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _heads(case: Case, ratio: int) -> tuple[int, int, int]:
    """Head dim, query heads, KV heads: `ratio` query heads for each KV head."""
    dim = case.constexprs["D"]
    heads = HIDDEN // dim
    return dim, heads, max(1, heads // ratio)


def _decode_prefix(case: Case) -> Work:
    tile, grouped = case.constexprs, case.constexprs["GROUPED"]
    rows = tile["BLOCK_M"]
    ratio = max(1, rows // G) if grouped else 1
    dim, heads, kv_heads = _heads(case, ratio)
    groups, splits, size = (B // G if grouped else B), _cdiv(P, tile["SPLIT"]), _bytes_of(case, "k_ptr")
    row_tiles = _cdiv((G if grouped else 1) * (heads // kv_heads), rows)
    scores = groups * kv_heads * row_tiles * rows * P
    keys = 2 * groups * P * kv_heads * dim * size
    partials = splits * B * heads * (dim + 1) * 4
    return Work(
        f"B={B} P={P} {f'G={G}' if grouped else 'ungrouped'} heads={heads}/{kv_heads}",
        groups * kv_heads * row_tiles * splits,
        keys + partials + B * heads * dim * _bytes_of(case, "q_ptr"),
        _pages_in_flight(case, size),
        4 * dim * scores,
        scores,
        SOFTMAX_OPS * scores,
    )


def _pages_in_flight(case: Case, size: int) -> int:
    """Half of the stages hold keys and values, the other half page numbers."""
    return 2 * max(1, case.num_stages // 2) * case.constexprs["BLOCK_N"] * case.constexprs["D"] * size


def _decode_suffix(case: Case) -> Work:
    dim, heads, kv_heads = _heads(case, 1)
    size, splits = _bytes_of(case, "k_ptr"), _cdiv(P, 512)
    scores = B * kv_heads * case.constexprs["BLOCK_M"] * SEEN
    rest = B * heads * (splits * (dim + 1) * 4 + 2 * dim * _bytes_of(case, "q_ptr"))
    return Work(
        f"B={B} suffix {SEEN} heads={heads}",
        B * kv_heads,
        2 * B * SEEN * kv_heads * dim * size + rest,
        _pages_in_flight(case, size),
        4 * dim * scores,
        scores,
        SOFTMAX_OPS * scores,
    )


def _prefill(case: Case) -> Work:
    dim, heads, kv_heads = _heads(case, 2)
    rows, columns = case.constexprs["BLOCK_M"], case.constexprs["BLOCK_N"]
    prefixes, tokens = TOKENS // P, rows * kv_heads // heads  # a tile holds `tokens` tokens of 2 heads
    tiles = _cdiv(P, max(1, tokens))
    seen = sum(_cdiv(min(P, (t + 1) * max(1, tokens)), columns) * columns for t in range(tiles))
    scores = prefixes * kv_heads * rows * seen
    size = _bytes_of(case, "q_ptr")
    moved = TOKENS * (2 * heads * dim * size + 2 * kv_heads * dim * _bytes_of(case, "k_ptr"))
    return Work(
        f"{prefixes} x {P} tokens heads={heads}/{kv_heads}",
        prefixes * kv_heads * tiles,
        moved,
        _pages_in_flight(case, _bytes_of(case, "k_ptr")),
        4 * dim * scores,
        scores,
        SOFTMAX_OPS * scores,
    )


def _shared_prefix(products: int, tensors: int) -> Callable[[Case], Work]:
    """A kernel that runs `products` of 2 D operations a visible pair, and moves `tensors` of [T, H, D]."""

    def work(case: Case) -> Work:
        dim, heads, _ = _heads(case, 1)
        row = P + G * S
        rows = TOKENS // row
        pairs = P * (P + 1) // 2 + G * (S * P + S * (S + 1) // 2)
        block = (
            case.constexprs["BLOCK_M"] if "dkv" not in case.kernel.__name__ else case.constexprs["BLOCK_N"]
        )
        # A causal tile computes its half-masked diagonal block too.
        diagonal = row * case.constexprs["BLOCK_N"] // 2
        scores = rows * heads * (pairs + diagonal)
        size = _bytes_of(case, "q_ptr")
        return Work(
            f"{rows} rows of {P} + {G} x {S} heads={heads}",
            rows * heads * _cdiv(row, block),
            tensors * rows * row * heads * dim * size,
            max(1, case.num_stages - 1) * 2 * case.constexprs["BLOCK_N"] * dim * size,
            2 * dim * products * scores,
            scores,
            SOFTMAX_OPS * scores,
        )

    return work


def _product(
    case: Case, rows: int, columns: int, inner: int, names: tuple[str, str, str]
) -> dict[str, float]:
    """Programs, bytes in flight and operations of an [rows, inner] x [inner, columns] product in tiles."""
    m, n, k = (case.constexprs[name] for name in names)
    pointer = "hidden_ptr" if "hidden_ptr" in case.signature else "b_ptr"
    size = _bytes_of(case, pointer)
    return {
        "programs": _cdiv(rows, m) * _cdiv(columns, n),
        "in_flight": (case.num_stages - 1) * (m + n) * k * size,
        "tensor_flops": 2.0 * _cdiv(rows, m) * m * _cdiv(columns, n) * n * inner,
    }


def _logprob_stats(case: Case) -> Work:
    size, split = _bytes_of(case, "hidden_ptr"), case.constexprs["SPLIT"]
    found = _product(case, TOKENS, VOCAB, HIDDEN, ("BLOCK_N", "BLOCK_V", "BLOCK_H"))
    found["programs"] = _cdiv(TOKENS, case.constexprs["BLOCK_N"]) * _cdiv(VOCAB, split)
    scores = TOKENS * VOCAB
    return Work(
        f"N={TOKENS} H={HIDDEN} V={VOCAB}",
        num_bytes=(TOKENS + VOCAB) * HIDDEN * size + 12 * TOKENS * _cdiv(VOCAB, split),
        special=scores,
        scalar=SOFTMAX_OPS * scores,
        **found,  # type: ignore[arg-type]
    )


def _dlogits(case: Case) -> Work:
    size, scores = _bytes_of(case, "hidden_ptr"), CHUNK * CHUNK
    return Work(
        f"{CHUNK} x {CHUNK} of N={TOKENS}",
        num_bytes=2 * CHUNK * HIDDEN * size + scores * size,
        special=scores,
        scalar=6 * scores,
        **_product(case, CHUNK, CHUNK, HIDDEN, ("BLOCK_N", "BLOCK_V", "BLOCK_H")),  # type: ignore[arg-type]
    )


def _accumulate(case: Case) -> Work:
    size = _bytes_of(case, "b_ptr")
    low = 2 if "low_ptr" in case.signature else 0
    return Work(
        f"{CHUNK} x {CHUNK} @ {CHUNK} x {HIDDEN}",
        num_bytes=(CHUNK * CHUNK + (3 + low) * CHUNK * HIDDEN) * size,
        **_product(case, CHUNK, HIDDEN, CHUNK, ("BLOCK_M", "BLOCK_H", "BLOCK_K")),  # type: ignore[arg-type]
    )


def _head_sample(case: Case) -> Work:
    size, greedy, scores = _bytes_of(case, "hidden_ptr"), case.constexprs["GREEDY"], B * VOCAB
    tiles = _cdiv(VOCAB, case.constexprs["BLOCK_V"])
    return Work(
        f"B={B} H={HIDDEN} V={VOCAB}",
        num_bytes=(B + VOCAB) * HIDDEN * size + 20 * B * tiles,
        special=scores * (1 if greedy else 3),
        scalar=scores * (8 if greedy else 20 + PHILOX_OPS),
        **_product(case, B, VOCAB, HIDDEN, ("BLOCK_B", "BLOCK_V", "BLOCK_H")),  # type: ignore[arg-type]
    )


def _elementwise(shape: str, programs: int, num_bytes: float, special: float = 0, scalar: float = 0) -> Work:
    """A kernel whose program asks for all it reads at once; half of the bytes are reads, or more."""
    return Work(shape, programs, num_bytes, num_bytes / programs / 2, 0.0, special, scalar)


def _rms_norm(case: Case) -> Work:
    width, size = case.constexprs["BLOCK_H"], _bytes_of(case, "x_ptr")
    tensors = 4 if case.constexprs["HAS_RESIDUAL"] else 2
    return _elementwise(f"[{B}, {width}]", B, tensors * B * width * size, scalar=6 * B * width)


def _swiglu(case: Case) -> Work:
    programs = B * _cdiv(FFN, case.constexprs["BLOCK_F"])
    return _elementwise(f"[{B}, {FFN}]", programs, 3 * B * FFN * 2, special=B * FFN, scalar=5 * B * FFN)


def _rotary(case: Case) -> Work:
    programs = B * _cdiv(HIDDEN // 128, case.constexprs["BLOCK_HEADS"])
    return _elementwise(f"[{B}, {HIDDEN // 128}, 128]", programs, 2 * B * HIDDEN * 2, scalar=3 * B * HIDDEN)


def _rotate_pair(case: Case) -> Work:
    channels = 2 * HIDDEN  # MHA: queries and keys
    moved = TOKENS * (2 * channels * _bytes_of(case, "q_ptr") + 8 * 64)
    return _elementwise(f"[{TOKENS}, {channels // 128}, 128]", TOKENS, moved, scalar=3 * TOKENS * channels)


def _fp8_linear(case: Case) -> Work:
    """The gate and up projection of as many rows as a tile has, or of a decode step."""
    rows = max(case.constexprs["BLOCK_M"], 16)
    rows = B if rows == 128 else rows
    m, n, inner = case.constexprs["BLOCK_M"], case.constexprs["BLOCK_N"], case.constexprs["K"]
    columns, k = 2 * FFN, case.constexprs["BLOCK_K"]
    flops = 2.0 * _cdiv(rows, m) * m * columns * inner
    return Work(
        f"[{rows}, {inner}] x [{columns}, {inner}]",
        _cdiv(rows, m) * _cdiv(columns, n),
        columns * inner + 2 * rows * (inner + columns),
        (case.num_stages - 1) * (2 * m + n) * k,
        # Predicted at bf16's rate, which is right for "current", and cautious for "blockwise".
        flops,
        scalar=2.0 * _cdiv(rows, m) * m * columns * inner / k,
    )


def _kv_write(case: Case) -> Work:
    width = case.constexprs["H_KV"] * case.constexprs["D"]
    moved = 2 * B * width * (2 + _bytes_of(case, "k_pages_ptr"))
    return _elementwise(
        f"[{B}, {case.constexprs['H_KV']}, {case.constexprs['D']}]", B, moved, scalar=2 * B * width
    )


def _store_qkv(case: Case) -> Work:
    kv, ratio, dim = (case.constexprs[name] for name in ("H_KV", "R", "D"))
    moved = B * kv * dim * (2 * (ratio + 2) + 2 * ratio + 2 * _bytes_of(case, "k_pages_ptr"))
    return _elementwise(
        f"[{B}, {kv * (ratio + 2)}, {dim}]", B * kv, moved, scalar=6 * B * kv * (ratio + 2) * dim
    )


def _random(case: Case) -> Work:
    numbers = B * VOCAB
    programs = B * _cdiv(VOCAB, case.constexprs["BLOCK_C"])
    return Work(f"[{B}, {VOCAB}]", programs, 4 * numbers, 4 * 512, 0.0, 2 * numbers, 4 * PHILOX_OPS * numbers)


def _merge_tiles(case: Case) -> Work:
    tiles = case.constexprs["BLOCK_TILES"]
    return _elementwise(f"[5, {B}, {tiles}]", _cdiv(B, case.constexprs["BLOCK_B"]), 20 * B * tiles, B * tiles)


def _rows_of_a_step(num_bytes: int) -> Callable[[Case], Work]:
    return lambda case: _elementwise(f"[{B}]", _cdiv(B, case.constexprs["BLOCK"]), num_bytes * B)


def _cut_off(case: Case) -> Work:
    """16 passes a search; the first comes from memory, the others from the cache, where a row stays."""
    searches = case.constexprs["HAS_K"] + case.constexprs["HAS_P"]
    size = 4 + 8 * case.constexprs["HAS_P"]
    numbers = B * VOCAB
    return Work(
        f"[{B}, {VOCAB}]",
        B,
        (size + 1) * numbers,
        size * case.constexprs["BLOCK_V"],
        scalar=16 * 14 * searches * numbers,
    )


def _dpo(case: Case) -> Work:
    tokens = 2 * B * S  # B pairs
    return _elementwise(f"{B} pairs of {S} tokens", B, 8 * tokens, scalar=4 * tokens)


WORK: dict[str, Callable[[Case], Work]] = {
    "_prefix_kernel": _decode_prefix,
    "_suffix_kernel": _decode_suffix,
    "_prefill_kernel": _prefill,
    "forward_kernel": _shared_prefix(2, 4),
    "dq_kernel": _shared_prefix(3, 6),
    "dkv_kernel": _shared_prefix(4, 6),
    "head_stats_kernel": _logprob_stats,
    "dlogits_kernel": _dlogits,
    "accumulate_kernel": _accumulate,
    "head_sample_kernel": _head_sample,
    "merge_tiles_kernel": _merge_tiles,
    "rms_norm_kernel": _rms_norm,
    "swiglu_kernel": _swiglu,
    "rotary_kernel": _rotary,
    "rotate_pair_kernel": _rotate_pair,
    "fp8_linear_kernel": _fp8_linear,
    "_write_kernel": _kv_write,
    "_store_kernel": _store_qkv,
    "random_kernel": _random,
    "dpo_kernel": _dpo,
    "cut_off_kernel": _cut_off,
    "_slots_kernel": _rows_of_a_step(16),
    "_advance_kernel": _rows_of_a_step(84),
}
"""The kernel's name -> its work at the reference shape."""


def work_of(case: Case) -> Work:
    """What the case's kernel does at the reference shape."""
    return WORK[case.kernel.__name__](case)
