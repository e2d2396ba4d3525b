"""Triton kernels of attention over a packed stream, forward and backward. _shared_prefix_triton.py runs them.

Shapes: T tokens, Hq query heads, H_kv KV heads, R = Hq / H_kv, D head dim. `segment_start`, `seen_until` and
the tile tables are `RowLayout`'s.

Two facts keep the kernels short. A query sees two runs of keys: its row's prefix, and its own segment up to
itself; so a tile of queries counts its keys through the former and on into the latter, and masks only where
its queries differ. And a key is seen by one run of queries, even a prefix's, since the suffixes follow in the
stream; so one program adds up all of a prefix tile's dK and dV, in a fixed order and without atomics.

Forward, with log2(e) in the scale:      s = scale q k^T      l = log2 sum_j 2^s      o = sum_j 2^(s - l) v
Backward, with delta = sum_d do o:      p = 2^(s - l)      ds = p (do v^T - delta)
                                        dq = scale ds k      dk = scale ds^T q      dv = p^T do
"""

from __future__ import annotations

from sip_engine.kernels._triton import jit, tl


@jit
def _load_keys(
    ptr, n, end, prefix_len, gap, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of the keys (or values) that a query tile counts as `n`: [BLOCK_N, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    token = n + tl.where(n < prefix_len, 0, gap)
    live = (d < D)[None, :]
    if MASKED:
        live &= (n < end)[:, None]
    return tl.load(ptr + token[:, None] * stride + d[None, :], mask=live, other=0.0)


@jit
def _seen(start, prefix_len, lower, upper, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: is key n = start + column in the prefix or in [lower, upper], the query's own segment?

    The column is compared with differences to `start`: n itself, which addresses depend on, would be kept
    through the stages of the pipeline in the layout of s, at up to 64 registers a thread.
    """
    column = tl.arange(0, BLOCK_N)[None, :]
    own = (column >= (lower - start)[:, None]) & (column <= (upper - start)[:, None])
    return (column < prefix_len - start) | own


@jit
def _tile_rows(
    tiles_ptr, head, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Where a tile's rows of one head lie in a contiguous [T, HEADS, D]: first element, offsets, which exist.

    The load is volatile, so that a second call after the loops computes all of it again: see tile_origin.
    """
    first = tl.load(tiles_ptr, volatile=True)
    r = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    live = (r < tl.load(tiles_ptr + 1) - first)[:, None] & (d < D)[None, :]
    return (first.to(tl.int64) * HEADS + head) * D, r[:, None] * (HEADS * D) + d[None, :], live


@jit
def _load_query_tile(tiles_ptr, segment_start_ptr, BLOCK_M: tl.constexpr):
    """A row of the table `query_tiles`, with keys counted from 0 as the tile sees them.

    Returns (first query, its end, first token of the row, keys of the prefix, tokens left out behind these,
    keys all queries see, end of the keys, first and last own key of each query [BLOCK_M]).
    """
    first = tl.load(tiles_ptr)
    last = tl.load(tiles_ptr + 1)
    row = tl.load(tiles_ptr + 2)
    prefix_len = tl.load(tiles_ptr + 3)
    own = tl.load(tiles_ptr + 4)
    seen_by_all = tl.load(tiles_ptr + 5)
    skipped = own - prefix_len  # stream index of key n >= prefix_len, less n
    query = first + tl.arange(0, BLOCK_M)
    lower = tl.load(segment_start_ptr + query, mask=query < last, other=own) - skipped
    return first, last, row, prefix_len, skipped - row, seen_by_all, last - skipped, lower, query - skipped


@jit
def _forward_keys(
    q, acc, m, z, k_ptr, v_ptr, stride_kt, stride_vt, begin, end, prefix_len, gap, lower, upper, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax of the queries `q` over the keys [begin, end); without MASKED they see them all."""
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _load_keys(k_ptr, n, end, prefix_len, gap, stride_kt, D, BLOCK_D, MASKED)
        s = tl.dot(q, k.T, input_precision="tf32x3") * scale
        if MASKED:
            s = tl.where(_seen(start, prefix_len, lower, upper, BLOCK_N), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = m_new
        if MASKED:  # a query need not have seen any key yet
            base = tl.where(m_new > float("-inf"), m_new, 0.0)
        rescale = tl.exp2(m - base)
        p = tl.exp2(s - base[:, None])
        v = _load_keys(v_ptr, n, end, prefix_len, gap, stride_vt, D, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="tf32x3")
        z = z * rescale + tl.sum(p, 1)
        m = m_new
    return acc, m, z


@jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, segment_start_ptr,
    num_tokens, stride_kt, stride_kh, stride_vt, stride_vh, scale,
    H_KV: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: keys all of them see without a mask, then the others."""
    head = tl.program_id(0) % (H_KV * R)
    tiles_ptr += tl.program_id(0) // (H_KV * R) * 6
    first, last, row, prefix_len, gap, seen_by_all, end, lower, upper = _load_query_tile(
        tiles_ptr, segment_start_ptr, BLOCK_M
    )
    start, offsets, live = _tile_rows(tiles_ptr, head, H_KV * R, D, BLOCK_M, BLOCK_D)
    q = tl.load(q_ptr + start + offsets, mask=live, other=0.0)
    k_ptr += row.to(tl.int64) * stride_kt + head // R * stride_kh
    v_ptr += row.to(tl.int64) * stride_vt + head // R * stride_vh

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    unmasked = seen_by_all // BLOCK_N * BLOCK_N
    acc, m, z = _forward_keys(
        q, acc, m, z, k_ptr, v_ptr, stride_kt, stride_vt, 0, unmasked, prefix_len, gap, lower, upper, scale,
        False, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, m, z = _forward_keys(
        q, acc, m, z, k_ptr, v_ptr, stride_kt, stride_vt, unmasked, end, prefix_len, gap, lower, upper, scale,
        True, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    start, offsets, live = _tile_rows(tiles_ptr, head, H_KV * R, D, BLOCK_M, BLOCK_D)
    out = (acc / z[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + offsets, out, mask=live)
    r = tl.arange(0, BLOCK_M)
    lse_ptr += head.to(tl.int64) * num_tokens + first
    tl.store(lse_ptr + r, m + tl.log2(z), mask=r < last - first)


@jit
def _dq_keys(
    q, do, dq, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, begin, end, prefix_len, gap, lower, upper, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add ds k over the keys [begin, end) to dq."""
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _load_keys(k_ptr, n, end, prefix_len, gap, stride_kt, D, BLOCK_D, MASKED)
        p = tl.exp2(tl.dot(q, k.T, input_precision="tf32x3") * scale - lse[:, None])
        if MASKED:
            p = tl.where(_seen(start, prefix_len, lower, upper, BLOCK_N), p, 0.0)
        v = _load_keys(v_ptr, n, end, prefix_len, gap, stride_vt, D, BLOCK_D, MASKED)
        dp = tl.dot(do, v.T, input_precision="tf32x3")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="tf32x3")
    return dq


@jit(do_not_specialize=["num_tokens"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dq_ptr, lse_ptr, shift_ptr, tiles_ptr, segment_start_ptr,
    num_tokens, stride_kt, stride_kh, stride_vt, stride_vh, scale,
    H_KV: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head, over the forward's keys.

    It also writes what the other kernel adds to its products: -l / scale, and behind it -delta.
    """
    head = tl.program_id(0) % (H_KV * R)
    tiles_ptr += tl.program_id(0) // (H_KV * R) * 6
    first, last, row, prefix_len, gap, seen_by_all, end, lower, upper = _load_query_tile(
        tiles_ptr, segment_start_ptr, BLOCK_M
    )
    start, offsets, live = _tile_rows(tiles_ptr, head, H_KV * R, D, BLOCK_M, BLOCK_D)
    q = tl.load(q_ptr + start + offsets, mask=live, other=0.0)
    k_ptr += row.to(tl.int64) * stride_kt + head // R * stride_kh
    v_ptr += row.to(tl.int64) * stride_vt + head // R * stride_vh
    do = tl.load(dout_ptr + start + offsets, mask=live, other=0.0)
    out = tl.load(out_ptr + start + offsets, mask=live, other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    r = tl.arange(0, BLOCK_M)
    scalars = head.to(tl.int64) * num_tokens + first
    lse = tl.load(lse_ptr + scalars + r, mask=r < last - first, other=0.0)
    tl.store(shift_ptr + scalars + r, -lse / scale, mask=r < last - first)
    scalars = (H_KV * R + head).to(tl.int64) * num_tokens + first
    tl.store(shift_ptr + scalars + r, -delta, mask=r < last - first)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    unmasked = seen_by_all // BLOCK_N * BLOCK_N
    dq = _dq_keys(
        q, do, dq, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, 0, unmasked, prefix_len, gap, lower, upper,
        scale, False, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _dq_keys(
        q, do, dq, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, unmasked, end, prefix_len, gap, lower, upper,
        scale, True, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    start, offsets, live = _tile_rows(tiles_ptr, head, H_KV * R, D, BLOCK_M, BLOCK_D)
    dq = (dq * (scale * 0.6931471805599453)).to(dq_ptr.dtype.element_ty)  # scale has log2(e) in it
    tl.store(dq_ptr + start + offsets, dq, mask=live)


@jit
def _dkv_queries(
    k, v, dk, dv, q_ptr, dout_ptr, s_ptr, dp_ptr, begin, end, num_queries, until, scale,
    MASKED: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add p^T do and ds^T q over the queries [begin, end), counted from the tile's first key, to dv and dk.

    The products q k^T and do v^T start from what is to be subtracted from them, which then takes no registers
    of its own. Behind `num_queries` all four loads give zero and so is ds: nothing is added.
    """
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        offsets = i[:, None] * STRIDE + d[None, :]
        live = (i < num_queries)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + offsets, mask=live, other=0.0)
        s = tl.load(s_ptr + i, mask=i < num_queries, other=0.0)
        s = tl.broadcast_to(s[None, :], [BLOCK_N, BLOCK_M])
        p = tl.exp2(tl.dot(k, q.T, s, input_precision="tf32x3") * scale)
        if MASKED:
            column = tl.arange(0, BLOCK_M)[None, :]  # as in _seen
            key = tl.arange(0, BLOCK_N) - start
            p = tl.where((column >= key[:, None]) & (column < (until - start)[:, None]), p, 0.0)
        do = tl.load(dout_ptr + offsets, mask=live, other=0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="tf32x3")
        dp = tl.load(dp_ptr + i, mask=i < num_queries, other=0.0)
        dp = tl.broadcast_to(dp[None, :], [BLOCK_N, BLOCK_M])
        ds = p * tl.dot(v, do.T, dp, input_precision="tf32x3")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="tf32x3")
    return dk, dv


@jit(do_not_specialize=["num_tokens"])
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, shift_ptr, tiles_ptr, seen_until_ptr,
    num_tokens, stride_kt, stride_kh, stride_vt, stride_vh, scale,
    H_KV: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one KV head, over all queries of its heads that see any of them."""
    head = tl.program_id(0) % H_KV
    tiles_ptr += tl.program_id(0) // H_KV * 4
    first = tl.load(tiles_ptr)
    num_keys = tl.load(tiles_ptr + 1) - first
    masked = tl.cdiv(tl.load(tiles_ptr + 2) - first, BLOCK_M) * BLOCK_M
    num_queries = tl.load(tiles_ptr + 3) - first
    r = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    live = (r < num_keys)[:, None] & (d < D)[None, :]
    until = tl.load(seen_until_ptr + first + r, mask=r < num_keys, other=0) - first
    k_ptr += first.to(tl.int64) * stride_kt + head * stride_kh
    k = tl.load(k_ptr + r[:, None] * stride_kt + d[None, :], mask=live, other=0.0)
    v_ptr += first.to(tl.int64) * stride_vt + head * stride_vh
    v = tl.load(v_ptr + r[:, None] * stride_vt + d[None, :], mask=live, other=0.0)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = (first.to(tl.int64) * H_KV + head) * (R * D)
    q_ptr += start
    dout_ptr += start
    s_ptr = shift_ptr + (head * R).to(tl.int64) * num_tokens + first
    dp_ptr = shift_ptr + ((H_KV + head) * R).to(tl.int64) * num_tokens + first
    for _ in range(R):
        dk, dv = _dkv_queries(
            k, v, dk, dv, q_ptr, dout_ptr, s_ptr, dp_ptr, 0, masked, num_queries, until, scale,
            True, H_KV * R * D, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        dk, dv = _dkv_queries(
            k, v, dk, dv, q_ptr, dout_ptr, s_ptr, dp_ptr, masked, num_queries, num_queries, until, scale,
            False, H_KV * R * D, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        q_ptr += D
        dout_ptr += D
        s_ptr += num_tokens
        dp_ptr += num_tokens
    start, offsets, live = _tile_rows(tiles_ptr, head, H_KV, D, BLOCK_N, BLOCK_D)
    dk *= scale * 0.6931471805599453
    tl.store(dk_ptr + start + offsets, dk.to(dk_ptr.dtype.element_ty), mask=live)
    tl.store(dv_ptr + start + offsets, dv.to(dv_ptr.dtype.element_ty), mask=live)
