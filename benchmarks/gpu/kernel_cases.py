"""Every kernel as a case: inputs, our call, what it should give in float64, and who else computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cascade import CASCADE
from benchmarks.gpu.case import ERROR, FP8, TINY, KernelCase, Sizes, random
from benchmarks.gpu.head_peers import head_peers
from benchmarks.gpu.peers import Beside, Tensors, floor
from sip_engine.kernels._flash_attn import find_flash
from sip_engine.kernels._logprob_triton import CHUNK_COLUMNS, CHUNK_ROWS
from sip_engine.kernels.attention_choice import Shape
from sip_engine.kernels.decode_attention import decode_attention, decode_attention_reference
from sip_engine.kernels.kv_layout import gather_pages
from sip_engine.kernels.kv_write import write_kv, write_kv_reference
from sip_engine.kernels.logprob_head import logprob_head
from sip_engine.kernels.prefill_attention import prefill_attention, prefill_attention_reference
from sip_engine.kernels.random import gumbel, gumbel_reference, sequence_key
from sip_engine.kernels.rms_norm import rms_norm, rms_norm_reference
from sip_engine.kernels.rotary import rotary, rotary_reference
from sip_engine.kernels.sample import sample, sample_reference
from sip_engine.kernels.shared_prefix_attention import (
    RowLayout,
    shared_prefix_attention,
    shared_prefix_attention_reference,
)
from sip_engine.kernels.store_qkv import store_qkv, store_qkv_reference
from sip_engine.kernels.swiglu import swiglu, swiglu_reference


def _no_flash() -> str:
    found = find_flash()
    return found if isinstance(found, str) else ""


def _tables(start: int, rows: int, length: int, page: int) -> tuple[Tensor, int]:
    """Block tables [rows, blocks] int32 of pages in a shuffled order, and the first page after them."""
    blocks = -(-length // page)
    generator = torch.Generator().manual_seed(start)
    order = torch.randperm(rows * blocks, generator=generator).view(rows, blocks) + start
    return order.to(torch.int32).to("cuda"), start + rows * blocks


def _paged(s: Sizes, seed: int, num_pages: int) -> dict[str, Any]:
    kv_heads = s.heads // s.ratio
    k, v = (random(seed + i, num_pages, s.page, kv_heads, s.dim, dtype=torch.float32) for i in range(2))
    pages: dict[str, Any] = {"k_pages": k.to(s.pages), "v_pages": v.to(s.pages)}
    if s.pages == FP8:
        scale = torch.linspace(0.5, 2.0, kv_heads, device="cuda")
        pages |= {"k_scale": scale, "v_scale": scale.flip(0)}
    return pages


def decode_inputs(s: Sizes, seed: int) -> dict[str, Any]:
    """Keyword arguments of `decode_attention`."""
    groups = s.sequences // s.group
    prefix_tables, used = _tables(0, groups, s.prefix, s.page)
    suffix_tables, used = _tables(used, s.sequences, s.seen, s.page)
    ints = {"dtype": torch.int32, "device": "cuda"}
    return {
        "q": random(seed, s.sequences, s.heads, s.dim, dtype=s.dtype),
        **_paged(s, seed + 1, used),
        "group_starts": torch.arange(0, s.sequences + 1, s.group, **ints),
        "prefix_tables": prefix_tables,
        "prefix_lens": torch.full((groups,), s.prefix, **ints),
        "suffix_tables": suffix_tables,
        "suffix_lens": torch.full((s.sequences,), s.seen, **ints),
    }


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    """Floating tensors in float64; float8 pages as they are, since their scales say what they stand for."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != FP8 else x
        for name, x in inputs.items()
    }


def _decode(s: Sizes, name: str) -> KernelCase:
    """The prefix's kernel and the suffixes'."""
    pages = "fp8e4nv" if s.pages == FP8 else "bf16"
    parts = f"rows={s.group * s.ratio}", "rows=16"
    predicted = {
        f"decode {part} {pages} pages D={s.dim} {rows}": 1.0
        for part, rows in zip(("prefix", "suffix"), parts, strict=True)
        if s.ratio == 1 or part == "prefix"  # the suffix is predicted for one query head a KV head
    }

    def run(inputs: dict[str, Any], impl: str = "triton") -> Tensors:
        return (decode_attention(**inputs, impl=impl, group_size=s.group),)

    return KernelCase(
        name,
        lambda seed: decode_inputs(s, seed),
        run,
        lambda inputs: (decode_attention_reference(**wide(inputs)),),
        ERROR[s.dtype],
        {"our ungrouped kernel": Beside(lambda inputs: lambda: run(inputs, "triton_ungrouped"))}
        | ({} if s.pages == FP8 else {"FlashInfer's cascade": CASCADE}),
        5.0 if s.group * s.ratio == 16 and s.pages == torch.bfloat16 else None,
        predicted,
        (Shape("decode", s.dim, s.ratio, s.group, s.prefix), {"our ungrouped kernel": "triton_ungrouped"}),
    )


def _prefill(s: Sizes, name: str) -> KernelCase:
    prompts = max(1, s.tokens // s.prefix)

    def make(seed: int) -> dict[str, Any]:
        tables, used = _tables(0, prompts, s.prefix, s.page)
        ints = {"dtype": torch.int32, "device": "cuda"}
        return {
            "q": random(seed, prompts * s.prefix, s.heads, s.dim, dtype=s.dtype),
            **_paged(s, seed + 1, used),
            "tables": tables,
            "cu_seqlens": torch.arange(0, prompts * s.prefix + 1, s.prefix, **ints),
            "context_lens": torch.full((prompts,), s.prefix, **ints),
        }

    def dense(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Queries, and keys and values in one piece."""
        k, v = (
            gather_pages(
                inputs[f"{x}_pages"], inputs["tables"], s.prefix, inputs.get(f"{x}_scale"), s.dtype
            ).flatten(0, 1)
            for x in "kv"
        )
        return inputs["q"], k, v

    def torchs(inputs: dict[str, Any]) -> Callable[[], Tensors]:
        q, k, v = (x.view(prompts, s.prefix, -1, s.dim).transpose(1, 2) for x in dense(inputs))

        def call() -> Tensors:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=s.ratio > 1)
            return (out.transpose(1, 2).flatten(0, 1),)

        return call

    layout = RowLayout((s.prefix,) * prompts, ((),) * prompts, torch.device("cuda"))

    def flash(inputs: dict[str, Any]) -> Callable[[], Tensors]:
        q, k, v = dense(inputs)
        return lambda: (shared_prefix_attention(q, k, v, layout, scale=s.dim**-0.5, impl="flash"),)

    return KernelCase(
        name,
        make,
        lambda inputs: (prefill_attention(**inputs, impl="triton"),),
        lambda inputs: (prefill_attention_reference(**wide(inputs)),),
        ERROR[s.dtype],
        {
            "torch's attention, keys in one piece": Beside(torchs),
            "flash-attn, keys in one piece": Beside(flash, _no_flash),
        },
        predicted=dict.fromkeys(["prefill bf16 pages D=128 rows=128"] * (s.ratio == 2), 1),
        choice=(Shape("prefill", s.dim, s.ratio, 0, s.prefix), {"flash-attn, keys in one piece": "flash"}),
    )


def _shared_prefix(s: Sizes) -> KernelCase:
    layout = RowLayout((s.prefix,) * s.rows, ((s.suffix,) * s.group,) * s.rows, torch.device("cuda"))
    total = s.rows * (s.prefix + s.group * s.suffix)
    kv_heads = s.heads // s.ratio

    def make(seed: int) -> dict[str, Any]:
        heads = (s.heads, kv_heads, kv_heads, s.heads)
        return {
            name: random(seed + i, total, n, s.dim, dtype=s.dtype)
            for i, (name, n) in enumerate(zip(("q", "k", "v", "grad"), heads, strict=True))
        }

    def both(inputs: dict[str, Any], impl: str) -> Tensors:
        q, k, v = (inputs[name].detach().requires_grad_() for name in ("q", "k", "v"))
        scale = s.dim**-0.5
        if impl == "reference":
            out = shared_prefix_attention_reference(q, k, v, layout, scale)
        else:
            out = shared_prefix_attention(q, k, v, layout, scale=scale, impl=impl)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs["grad"]))

    return KernelCase(
        "shared_prefix, forward and backward",
        make,
        lambda inputs: both(inputs, "triton"),
        lambda inputs: both(wide(inputs), "reference"),
        ERROR[s.dtype],
        {"flash-attn": Beside(lambda inputs: lambda: both(inputs, "flash"), _no_flash)},
        predicted={f"shared_prefix {name} bf16 D=128": 1 for name in ("forward", "dq", "dkv")},
        choice=(Shape("training", s.dim, s.ratio, s.group, s.prefix), {"flash-attn": "flash"}),
    )


def _logprob(s: Sizes) -> KernelCase:
    """The stated target, 1.15 bare products, is out of reach: the backward pass computes the logits once more."""
    chunks = s.tokens * s.vocab / CHUNK_ROWS / CHUNK_COLUMNS

    def make(seed: int) -> dict[str, Any]:
        targets = torch.randint(0, s.vocab, (s.tokens,), generator=torch.Generator().manual_seed(seed))
        return {
            "hidden": random(seed, s.tokens, s.hidden, dtype=s.dtype),
            "weight": random(seed + 1, s.vocab, s.hidden, dtype=s.dtype) * s.hidden**-0.5,
            "targets": targets.to("cuda"),
        }

    def both(inputs: dict[str, Any], impl: Any) -> Tensors:
        hidden, weight = (inputs[name].detach().requires_grad_() for name in ("hidden", "weight"))
        found = logprob_head(hidden, weight, inputs["targets"], impl=impl)
        return (found.detach(), *torch.autograd.grad(found.mean(), (hidden, weight)))

    def bare(inputs: dict[str, Any]) -> Tensor:
        """Three products of the same shapes."""
        hidden, weight = inputs["hidden"], inputs["weight"]
        logits = hidden @ weight.T
        return logits.T @ hidden, logits @ weight  # type: ignore[return-value]

    return KernelCase(
        "logprob, forward and backward",
        make,
        lambda inputs: both(inputs, "triton"),
        lambda inputs: both(wide(inputs), "reference"),
        ERROR[s.dtype],
        {"three bare products": floor(bare), **head_peers()},
        -1.6,
        {"logprob stats bf16": 1}
        | {f"logprob {name} bf16": chunks for name in ("dlogits", "d hidden", "d weight")},
    )


def _head_sample(s: Sizes) -> KernelCase:
    def make(seed: int) -> tuple[Tensor, ...]:
        rows = torch.arange(s.sequences)
        return (
            random(seed, s.sequences, s.hidden, dtype=s.dtype),
            random(seed + 1, s.vocab, s.hidden, dtype=s.dtype) * s.hidden**-0.5,
            sequence_key(seed, 0, 0, rows).to("cuda"),
            rows.to("cuda"),
        )

    def of(found: Any) -> Tensors:
        return found.perturbed, found.max, found.sum_exp.log() + found.max

    return KernelCase(
        "head and sample",
        make,
        lambda inputs: of(sample(*inputs, impl="triton")),
        lambda inputs: of(
            sample_reference(inputs[0], inputs[1], inputs[2], inputs[3], 1.0, 0)
        ),  # float32: products of bfloat16 are exact there
        1e-3,
        {"the bare product": floor(lambda inputs: inputs[0] @ inputs[1].T)},
        -1.3,
        {"head_sample bf16": 1, "merge_tiles V=32000": 1},
    )


def _store_qkv(s: Sizes) -> KernelCase:
    kv_heads = s.heads // s.ratio

    def make(seed: int) -> dict[str, Any]:
        angles = torch.arange(64.0)[:, None] / 10 ** torch.arange(s.dim // 2)
        num_pages = -(-s.sequences // s.page)
        pages = torch.zeros(num_pages, s.page, kv_heads, s.dim, dtype=s.dtype, device="cuda")
        return {
            "mixed": random(seed, s.sequences, kv_heads * (s.ratio + 2) * s.dim, dtype=s.dtype),
            "cos": angles.cos().to("cuda"),
            "sin": angles.sin().to("cuda"),
            "positions": (torch.arange(s.sequences) % 64).to("cuda"),
            "k_pages": pages,
            "v_pages": pages.clone(),
            "slots": torch.arange(s.sequences).to("cuda"),
        }

    def run(inputs: dict[str, Any], call: Callable, **options: Any) -> Tensors:
        q = call(**inputs, **options)
        return q, inputs["k_pages"].clone(), inputs["v_pages"].clone()

    return KernelCase(
        "QKV split, rotated and stored",
        make,
        lambda inputs: run(inputs, store_qkv, impl="triton"),
        lambda inputs: run(wide(inputs), store_qkv_reference),
        ERROR[s.dtype],
        predicted={"store_qkv bf16 pages H=8 R=2 D=128": 1},
    )


def _small_ones(s: Sizes) -> Iterator[KernelCase]:
    error = ERROR[s.dtype]

    def norm(seed: int) -> dict[str, Any]:
        x, residual = (random(seed + i, s.sequences, s.hidden, dtype=s.dtype) for i in range(2))
        return {"x": x, "residual": residual, "weight": random(9, s.hidden, dtype=s.dtype), "eps": 1e-5}

    yield KernelCase(
        "residual and norm",
        norm,
        lambda inputs: rms_norm(**inputs, impl="triton"),
        lambda inputs: tuple(rms_norm_reference(**wide(inputs))),
        error,
        predicted={"rms_norm bf16 H<=2048 + residual": 1},
    )
    yield KernelCase(
        "SwiGLU",
        lambda seed: random(seed, s.sequences, 2 * s.ffn, dtype=s.dtype),
        lambda x: (swiglu(x, impl="triton"),),
        lambda x: (swiglu_reference(x.double()),),
        error,
        predicted={"swiglu bf16": 1},
    )
    angles = torch.arange(64.0)[:, None] / 10 ** torch.arange(s.dim // 2)
    cos, sin = angles.cos().to("cuda"), angles.sin().to("cuda")
    positions = (torch.arange(s.sequences) % 64).to("cuda")
    yield KernelCase(
        "rotary",
        lambda seed: random(seed, s.sequences, s.heads, s.dim, dtype=s.dtype),
        lambda x: (rotary(x, cos, sin, positions, impl="triton"),),
        lambda x: (rotary_reference(x.double(), cos.double(), sin.double(), positions),),
        error,
        predicted={"rotary bf16 D=128": 1},
    )

    def cells(seed: int) -> dict[str, Any]:
        shape = (-(-s.sequences // s.page), s.page, s.heads, s.dim)
        pages = torch.zeros(shape, dtype=s.dtype, device="cuda")
        k, v = (random(seed + i, s.sequences, s.heads, s.dim, dtype=s.dtype) for i in range(2))
        slots = torch.arange(s.sequences).to("cuda")
        return {"k": k, "v": v, "k_pages": pages, "v_pages": pages.clone(), "slots": slots}

    def written(inputs: dict[str, Any], call: Callable, **options: Any) -> Tensors:
        call(**inputs, **options)
        return inputs["k_pages"].clone(), inputs["v_pages"].clone()

    yield KernelCase(
        "KV write",
        cells,
        lambda inputs: written(inputs, write_kv, impl="triton"),
        lambda inputs: written(inputs, write_kv_reference),
        0.0,
        predicted={"kv_write bf16 pages H=16 D=128": 1},
    )
    columns = torch.arange(min(s.vocab, 4096)).to("cuda")
    yield KernelCase(
        "gumbel",
        lambda seed: sequence_key(seed, 0, 0, torch.arange(s.sequences)).to("cuda"),
        lambda keys: (gumbel(keys, keys % 7, columns, impl="triton"),),
        lambda keys: (gumbel_reference(keys, keys % 7, columns),),
        1e-6,
    )


def kernel_cases(s: Sizes) -> list[KernelCase]:
    """Every kernel at one size: decode at the ratios and page formats that change its tile."""
    two = replace(s, ratio=2)
    cases = [_decode(s, "decode"), _prefill(two, "prefill, 2 query heads a KV head")]
    if s is not TINY:
        cases += [
            _decode(replace(s, ratio=4), "decode, 4 query heads a KV head"),
            _decode(replace(s, ratio=8), "decode, 8 query heads a KV head"),
            _decode(replace(s, dim=64), "decode, heads of 64"),
            _decode(replace(s, pages=FP8), "decode, float8 pages"),
            _prefill(replace(s, ratio=8, pages=FP8), "prefill, 8 query heads a KV head, float8 pages"),
        ]
    return [*cases, _shared_prefix(s), _logprob(s), _head_sample(s), _store_qkv(two), *_small_ones(s)]
