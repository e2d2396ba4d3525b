"""Calls of other libraries: plain-torch twins with their parameters get what computes the same thing as ours."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulated_cuda import emulated_cuda
from torch import Tensor

from benchmarks.gpu import kernels, peers
from benchmarks.gpu.case import TINY, KernelCase, Sizes
from benchmarks.gpu.kernel_cases import kernel_cases
from benchmarks.gpu.peers import Beside, Library


class CascadeTwin:
    """`MultiLevelCascadeAttentionWrapper` of FlashInfer 0.7.4: levels of pages, joined by their log-sum-exps."""

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        self.levels, self.layout = num_levels, kv_layout

    def plan(
        self, qo_indptr_arr: list[Tensor], paged_kv_indptr_arr: list[Tensor], paged_kv_indices_arr: list[Tensor],
        paged_kv_last_page_len: list[Tensor], num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int,
        causal: bool = False, pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None, window_left: int = -1, logits_soft_cap: float | None = None,
        rope_scale: float | None = None, rope_theta: float | None = None, q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        arrays = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        assert all(len(array) == self.levels for array in arrays)
        assert all(x.dtype == torch.int32 and x.is_cuda for array in arrays for x in array)
        assert all(0 < n <= page_size for last in paged_kv_last_page_len for n in last.tolist())
        self.plans = [[x.tolist() for x in level] for level in zip(*arrays, strict=True)]
        self.shape, self.page, self.causal = (num_qo_heads, num_kv_heads, head_dim), page_size, causal
        self.dtypes = q_data_type, kv_data_type

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        k_pages, v_pages = (x if self.layout == "NHD" else x.transpose(1, 2) for x in paged_kv_cache)
        assert k_pages.shape[1:] == (self.page, *self.shape[1:]) and q.shape[1:] == (
            self.shape[0],
            self.shape[2],
        )
        assert self.dtypes == (q.dtype, k_pages.dtype) and not self.causal
        out, ratio = torch.empty_like(q), self.shape[0] // self.shape[1]
        for row in range(len(q)):
            keys, values = [], []
            for queries, begins, pages, last in self.plans:
                group = next(g for g in range(len(last)) if queries[g] <= row < queries[g + 1])
                own = pages[begins[group] : begins[group + 1]]
                length = (len(own) - 1) * self.page + last[group]
                for found, cache in ((keys, k_pages), (values, v_pages)):
                    found.append(torch.cat([cache[page] for page in own])[:length])
            k, v = (torch.cat(found).repeat_interleave(ratio, 1) for found in (keys, values))
            scores = torch.einsum("hd,thd->ht", q[row], k) * self.shape[2] ** -0.5
            out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
        return out


def mean_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


class LigerLossTwin:
    """`LigerFusedLinearCrossEntropyLoss` of Liger 0.8.5: weight first."""

    def __call__(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return mean_nll(_input, lin_weight, target)


class LigerTokensTwin:
    """`LigerFusedLinearScaledCrossEntropyFunction` of Liger 0.8.5."""

    @staticmethod
    def apply(
        _input: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, ignore_index: int = -100,
        m_tiles_per_cluster: int = 1, return_entropy: bool = False, selected_token_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return F.cross_entropy(_input @ weight.T / temperature, target, reduction="none")


def quack_twin(
    x: Tensor, weight: Tensor, target: Tensor, chunk_size: int = 4096, ignore_index: int = -100,
    reduction: str = "mean", tuned: bool = True, use_scaled_exp: bool | None = None,
) -> Tensor:  # fmt: skip
    """`chunked_linear_cross_entropy` of quack 0.6.5."""
    return mean_nll(x, weight, target)


def cut_twin(
    e: Tensor, c: Tensor, targets: Tensor, ignore_index: int = -100, softcap: float | None = None,
    reduction: str = "mean", shift: bool = False, filter_eps: float | str | None = "high", impl: str = "cce",
) -> Tensor:  # fmt: skip
    """`linear_cross_entropy` of cut-cross-entropy 25.1.1."""
    assert filter_eps is None, "gradients below a threshold would be left out"
    return mean_nll(e, c, targets)


TWINS: dict[str, dict[str, Any]] = {
    "flashinfer": {"MultiLevelCascadeAttentionWrapper": CascadeTwin},
    "liger_kernel": {},
    "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": LigerLossTwin},
    "liger_kernel.ops": {"LigerFusedLinearScaledCrossEntropyFunction": LigerTokensTwin},
    "quack": {},
    "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": quack_twin},
    "cut_cross_entropy": {"linear_cross_entropy": cut_twin},
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of the libraries, as twins."""
    for name, contents in TWINS.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers.metadata, "version", lambda _: "twin")
    peers.why_missing.cache_clear()
    yield
    peers.why_missing.cache_clear()


def case_of(name: str, sizes: Sizes = TINY) -> KernelCase:
    return next(case for case in kernel_cases(sizes) if case.name == name)


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        ("decode", "FlashInfer's cascade"),
        ("logprob, forward and backward", "Liger"),
        ("logprob, forward and backward", "Liger, log-probs"),
        ("logprob, forward and backward", "quack"),
        ("logprob, forward and backward", "cut-cross-entropy"),
        ("prefill, 2 query heads a KV head", "torch's attention, keys in one piece"),
    ],
)
def test_a_peer_is_asked_for_what_ours_computes(installed: None, case: str, peer: str) -> None:
    with emulated_cuda():
        found = case_of(case)
        beside = found.peers[peer]
        assert not beside.missing() and beside.of_ours is not None
        inputs = found.make(0)
        gap = peers.largest_gap(beside.prepare(inputs)(), beside.of_ours(found.exact(inputs)))
    assert gap <= found.error


def test_pages_of_ragged_groups(installed: None) -> None:
    """Prefixes and suffixes that fill their last pages differently, in groups of different sizes."""
    with emulated_cuda():
        case = case_of("decode")
        inputs = case.make(0)
        ints = {"dtype": torch.int32, "device": "cuda"}
        inputs["group_starts"] = torch.tensor([0, 1, 6], **ints)
        inputs["prefix_lens"] = torch.tensor([TINY.prefix - 4, TINY.prefix - 1], **ints)
        inputs["suffix_lens"] = torch.tensor([1, 2, 3, 4, 5, 4], **ints)
        (theirs,) = case.peers["FlashInfer's cascade"].prepare(inputs)()
        (exact,) = case.exact(inputs)
        assert (theirs.double() - exact).abs().max().item() < 1e-5


def test_what_differs_or_fails_is_not_timed() -> None:
    def case(peer: Beside) -> KernelCase:
        return replace(CASE, peers={"peer": peer})

    CASE = KernelCase("double", lambda _: torch.ones(3), lambda x: (2 * x,), lambda x: (2 * x,), 1e-3)

    def outcome(peer: Beside) -> float | str:
        return kernels._time_beside(case(peer), peer, [torch.ones(3)], capture=False)

    assert isinstance(outcome(Beside(lambda x: lambda: (x + x,))), float)
    assert outcome(Beside(lambda x: lambda: (x * 2.01,))) == "differs by 0.005 of the largest, not timed"
    assert "inf" in str(outcome(Beside(lambda x: lambda: (torch.ones(2),))))
    assert isinstance(outcome(Beside(lambda x: lambda: (x * 9,), of_ours=None)), float), (
        "a floor is not compared"
    )
    assert outcome(Beside(lambda x: lambda: 1 / 0)) == "ZeroDivisionError: division by zero"
    assert outcome(Beside(lambda x: lambda: (x,), missing=lambda: "not installed")) == "not installed"


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    peers.why_missing.cache_clear()
    monkeypatch.setitem(
        peers.LIBRARIES, "none", Library("none", "no_such_module", "no-such-package-of-anybody")
    )
    monkeypatch.setitem(peers.LIBRARIES, "broken", Library("broken", "no_such_module", "pytest"))
    assert peers.why_missing("none") == "not installed"
    assert "does not import (ModuleNotFoundError" in peers.why_missing("broken")
    peers.why_missing.cache_clear()


def test_megatrons_engine_is_called_by_the_signatures_of_the_line_that_is_installed() -> None:
    """Its kernels need flash-attn and CUDA; what can be seen here is whether it takes these arguments."""
    from benchmarks.gpu import megatron_peer as peer

    calls: dict[str, tuple[tuple, dict]] = {}

    def recorder(name: str) -> Any:
        signature = inspect.signature(getattr(peer, name))

        def record(*args: Any, **kwargs: Any) -> Any:
            signature.bind(*args, **kwargs)
            calls[name] = args, kwargs
            return name

        record.__signature__ = signature  # type: ignore[attr-defined]
        return record

    names = (
        "DynamicInferenceContext",
        "GPTInferenceWrapper",
        "TextGenerationController",
        "DynamicInferenceEngine",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(peer, name, recorder(name))
        model = torch.nn.Linear(2, 2)
        model.config = None  # type: ignore[assignment]
        patch.setattr(peer, "plain_model", lambda *_: model)
        config = peer.ModelConfig(num_layers=1, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48)
        assert peer.engine_of(None, config, 90, 4) == "DynamicInferenceEngine"  # type: ignore[arg-type]
    assert list(calls) == list(names)
    assert calls["DynamicInferenceContext"][1].get("num_attention_heads", 2) == 2, (
        "0.16 sizes its pages by KV heads"
    )
    assert peer.sampling_of(3).num_tokens_to_generate == 3


def test_megatrons_own_model_computes_what_the_policy_does() -> None:
    """The weights that the dynamic engine gets, by Megatron's own attention, against transformers' Llama."""
    from llama import llama_of

    from benchmarks.gpu.megatron_peer import plain_model
    from sip_engine.config.schema import ModelConfig, ParallelConfig
    from sip_engine.distributed.megatron_cpu import megatron_device
    from sip_engine.distributed.mesh import start_mesh
    from sip_engine.policy.model import build_model

    config = ModelConfig(
        num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, init_std=0.2, precision="fp32"
    )
    policy = build_model(config, ParallelConfig(), 90, start_mesh(), seed=1)
    ids = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 7, 7).triu(1).bool()
    with torch.no_grad(), megatron_device():
        found = plain_model(policy, config, 90)(ids, torch.arange(7).expand(2, 7), mask)
    with torch.no_grad():
        wanted = llama_of(policy, 90)(ids).logits
    torch.testing.assert_close(found[..., :90], wanted, atol=2e-5, rtol=1e-4)
