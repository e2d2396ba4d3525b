"""The sampler's CUDA path on the emulated device: the CPU's tokens, graphs, and what the host waits for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL
from emulated_cuda import Device, DeviceError, emulated_cuda

from sip_engine.config.schema import ParallelConfig, SamplerConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.kernels.fp8_linear import Recipe
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.attention import PagedAttention
from sip_engine.sampler.continuous import decode_continuously
from sip_engine.sampler.requests import Completion, Request, SamplingParams
from sip_engine.sampler.sampler import Sampler

VOCAB = 90
LENGTHS = (3, 17)
PARAMS = SamplingParams(max_new_tokens=6, seed=3)
MODEL = SMALL_MODEL.model_copy(update={"precision": "fp32"})


def requests(n: int = 2) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(rng.integers(0, VOCAB, size).astype(np.int32), n, document=size, start=2 * size)
        for size in LENGTHS
    ]


def sampler_of(model: PolicyModel, mesh: Mesh, **settings) -> Sampler:
    views = weight_views(model, VOCAB, mesh.tp.rank)
    return Sampler(views, mesh, SamplerConfig(**{"kv_memory_mb": 1, "page_size": 4, **settings}))


def small_model(mesh: Mesh) -> PolicyModel:
    return build_model(MODEL, ParallelConfig(), VOCAB, mesh, seed=1)


@pytest.fixture
def cuda() -> Iterator[Device]:
    with emulated_cuda() as device:
        yield device


@pytest.fixture(scope="module")
def on_cpu(mesh: Mesh) -> list[list[Completion]]:
    return sampler_of(small_model(mesh), mesh).generate(requests(), PARAMS)


def tokens(done: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.ids.tolist() for c in group] for group in done]


def bits(done: list[list[Completion]]) -> list[tuple[list[int], bytes]]:
    return [(c.ids.tolist(), c.logprobs.tobytes()) for group in done for c in group]


def assert_same(done: list[list[Completion]], want: list[list[Completion]]) -> None:
    assert tokens(done) == tokens(want)
    for ours, theirs in zip(done, want, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_waves_replay_one_graph_and_draw_the_cpus_tokens(
    mesh: Mesh, cuda: Device, on_cpu: list[list[Completion]]
) -> None:
    """The first wave captures a step; a later one, of other prefixes and weights, replays it from the start."""
    mesh = start_mesh()
    model = small_model(mesh)
    sampler = sampler_of(model, mesh)
    with cuda.watch() as first:
        done = sampler.generate(requests(), PARAMS)
    assert_same(done, on_cpu)
    steps = PARAMS.max_new_tokens - 1
    assert first["replay"] == steps - 1
    assert first["empty_cache"] == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.125)
    other = [replace(r, prefix_ids=r.prefix_ids[::-1].copy()) for r in requests()]
    with cuda.watch() as second:
        done = sampler.generate(other, PARAMS)
    assert second["replay"] == steps
    eager = sampler_of(model, mesh, cuda_graph="off")
    with cuda.watch() as third:
        assert bits(eager.generate(other, PARAMS)) == bits(done)
    assert third["replay"] == 0
    assert not any(np.isnan(c.logprobs).any() for group in done for c in group)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9, "top_k": 20}], ids=["all", "cut off"])
def test_one_more_token_costs_one_replay(mesh: Mesh, cuda: Device, cut: dict) -> None:
    """No launch, copy, allocation or wait beside it; a wave waits for its results alone."""
    mesh = start_mesh()
    sampler, params = sampler_of(small_model(mesh), mesh), replace(PARAMS, **cut)
    sampler.generate(requests(), replace(params, max_new_tokens=6))
    seen = []
    for num_tokens in (6, 7):  # one shape of buffers
        with cuda.watch() as counts:
            sampler.generate(requests(), replace(params, max_new_tokens=num_tokens))
        seen.append(counts)
    six, seven = seen
    assert (six["replay"], seven["replay"]) == (5, 6)
    for kind in ("launch", "allocate", "upload", "read", "synchronise", "wait"):
        assert six[kind] == seven[kind], kind
    assert all(place.startswith("sip_engine/sampler/sampler.py") for place in six.places["synchronise"])
    assert six["synchronise"] == 2


def test_scales_of_float8_pages_are_those_of_the_wave(
    mesh: Mesh, cuda: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs read them from memory of their own, which every wave fills."""
    mesh = start_mesh()
    model, params, taken = small_model(mesh), replace(PARAMS, max_new_tokens=3), []
    sampler = sampler_of(model, mesh, kv_dtype="fp8")
    take = PagedAttention.take_scales
    monkeypatch.setattr(
        PagedAttention, "take_scales", lambda self, new: taken.append((self, new.cpu())) or take(self, new)
    )
    for _ in range(2):
        sampler.generate(requests(1), params)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)
    (graphs, first), (same, second) = taken
    torch.testing.assert_close(second[0], 9.0 * first[0], rtol=1e-3, atol=0)  # of the norm and of the matrix
    assert same is graphs and torch.equal(graphs.scales.cpu(), second)


def launches_of_a_step(cuda: Device, num_layers: int, fp8: Recipe | None = None, **settings) -> int:
    """What one more token launches, when no graph hides it."""
    mesh = start_mesh()
    model = build_model(
        MODEL.model_copy(update={"num_layers": num_layers, **settings}), ParallelConfig(), VOCAB, mesh, seed=1
    )
    views = replace(weight_views(model, VOCAB, 0), fp8=(fp8,) * num_layers)
    sampler = Sampler(views, mesh, SamplerConfig(kv_memory_mb=1, page_size=4, cuda_graph="off"))
    counts = []
    assert sampler.pages.keys  # made before anything is counted
    for num_tokens in (2, 3):
        with cuda.watch() as seen:
            sampler.generate(requests(1)[:1], replace(PARAMS, max_new_tokens=num_tokens))
        counts.append(seen["launch"])
    return counts[1] - counts[0]


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}], ids=["plain", "qk_norm"])
def test_a_layer_launches_ten_kernels_a_step(mesh: Mesh, cuda: Device, settings: dict) -> None:
    """Two fused norms, four matrices, the projection's split to stored keys, attention in two, SwiGLU."""
    one, two = (launches_of_a_step(cuda, layers, **settings) for layers in (1, 2))
    assert two - one == 10
    assert one - 10 <= 16, "placing tokens, embedding, first norm, head, draw, moving on"


def stopping(on_cpu: list[list[Completion]]) -> SamplingParams:
    """Stop at tokens that come at different times."""
    return replace(PARAMS, stop_ids=(int(on_cpu[0][0].ids[1]), int(on_cpu[1][1].ids[3])))


@pytest.mark.parametrize("preempt_every", [0, 2])
def test_continuous_batching_replays_and_never_waits_for_a_step(
    mesh: Mesh, cuda: Device, on_cpu: list[list[Completion]], preempt_every: int
) -> None:
    params = stopping(on_cpu)
    mesh = start_mesh()
    sampler = sampler_of(small_model(mesh), mesh)
    assert sampler.draw is not None and sampler.impl == "triton" and sampler.steps is not None
    with cuda.watch() as seen, torch.no_grad():
        done = decode_continuously(
            sampler.decoder,
            sampler.draw,
            sampler.pages,
            "triton",
            requests(),
            params,
            sampler.limits,
            steps=sampler.steps,
            preempt_every=preempt_every,
        )
    lengths = [[len(c.ids) for c in group] for group in done]
    assert len({n for group in lengths for n in group}) > 1
    cut = [
        [Completion(c.ids[:n], c.logprobs[:n]) for c, n in zip(*g, strict=True)]
        for g in zip(on_cpu, lengths, strict=True)
    ]
    assert_same(done, cut)
    assert all(set(params.stop_ids) & set(c.ids[-1:].tolist()) or len(c.ids) == 6 for g in done for c in g)
    assert seen["synchronise"] == 0
    assert seen["read"] == seen["wait"], "every read was waited for, and nothing else"
    assert seen["replay"] > 0
    assert sampler.pages_in_use == 0


def test_a_step_that_cannot_be_captured_is_run_eagerly_and_says_so(
    mesh: Mesh, cuda: Device, on_cpu: list[list[Completion]], monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    mesh = start_mesh()
    sampler = sampler_of(small_model(mesh), mesh)

    def refuse(*_: object, **__: object) -> None:
        raise DeviceError("operation not permitted")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", refuse)
    with cuda.watch() as seen:
        assert_same(sampler.generate(requests(), PARAMS), on_cpu)
    assert seen["replay"] == 0
    said = capfd.readouterr().err
    assert said.count("cannot be captured") == 1
    assert 'sampler.cuda_graph = "off"' in said.replace("\n", " ")


def test_reference_kernels_on_the_device(
    mesh: Mesh, cuda: Device, on_cpu: list[list[Completion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIP_KERNELS=reference: no Triton, no graph, and the same tokens."""
    monkeypatch.setenv("SIP_KERNELS", "reference")
    mesh = start_mesh()
    sampler = sampler_of(small_model(mesh), mesh)
    with cuda.watch() as seen:
        assert_same(sampler.generate(requests(), PARAMS), on_cpu)
        stopped = sampler.generate(requests(), stopping(on_cpu))
    assert seen["triton"] == seen["replay"] == 0 and seen["launch"] > 0
    assert tokens(stopped)[0][0] == on_cpu[0][0].ids[:2].tolist()


def test_prefixes_are_read_a_few_tokens_at_a_time(
    mesh: Mesh, cuda: Device, on_cpu: list[list[Completion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most the setting's, longer prefixes in parts; waves and rolling batches alike."""
    monkeypatch.setenv("SIP_KERNELS", "reference")
    mesh = start_mesh()
    sampler = sampler_of(small_model(mesh), mesh, prefill_tokens=18)
    sizes = []
    forward = sampler.decoder.forward

    def watching(inputs: torch.Tensor, *rest) -> torch.Tensor:
        sizes.append(len(inputs))
        return forward(inputs, *rest)

    sampler.decoder.forward = watching  # type: ignore[method-assign]
    assert_same(sampler.generate(requests(), PARAMS), on_cpu)
    assert sizes[:2] == [3, 17]
    sizes.clear()
    sampler.generate(requests(), replace(PARAMS, stop_ids=(VOCAB - 1,)))
    assert sizes[:2] == [3, 17]
    for most, passes in ((20, [20]), (7, [3, 7, 7, 3]), (1, [1] * 20)):
        sampler.steps.prefill_tokens = most  # type: ignore[union-attr]
        sizes.clear()
        assert_same(sampler.generate(requests(), PARAMS), on_cpu)
        assert sizes[: len(passes)] == passes


def test_parts_of_a_prefix_attend_to_those_before(
    mesh: Mesh, cuda: Device, on_cpu: list[list[Completion]]
) -> None:
    """Triton's kernels: what one pass makes of a prefix, three make of it, in memory for a third of it."""
    mesh = start_mesh()
    sampler = sampler_of(small_model(mesh), mesh, prefill_tokens=6)
    assert_same(sampler.generate(requests(), PARAMS), on_cpu)
    stopped = sampler.generate(requests(), stopping(on_cpu))
    assert tokens(stopped)[0][0] == on_cpu[0][0].ids[:2].tolist()


def test_pages_are_sized_by_free_memory_and_given_back(
    mesh: Mesh, cuda: Device, on_cpu: list[list[Completion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIP_KERNELS", "reference")
    mesh = start_mesh()
    model = small_model(mesh)
    fixed, sampler = sampler_of(model, mesh), sampler_of(model, mesh, kv_memory_mb="auto")
    before = cuda.allocated_bytes
    cuda.free_bytes, cuda.spare_bytes = 7 * 2**20, 3 * 2**20
    assert_same(sampler.generate(requests(), PARAMS), on_cpu)
    held = cuda.allocated_bytes - before
    assert 0.75 * 10 * 2**20 < held < 0.9 * 10 * 2**20
    sampler.give_back()
    gc.collect()
    assert sampler.kv_bytes_held == 0
    assert cuda.allocated_bytes - before < held / 1000, "the buffers of one step"
    limits, cuda.free_bytes = sampler.limits, 2**20  # the size stays that of the first look, so that waves do
    assert_same(sampler.generate(requests(), PARAMS), on_cpu)
    assert cuda.allocated_bytes - before == held and sampler.limits == limits
    assert fixed.pages.keys
    fixed.give_back()
    assert fixed.kv_bytes_held == 2**20, "a size in MiB is kept"


@pytest.mark.parametrize("same", [True, False], ids=["same addresses", "other addresses"])
def test_graphs_outlive_pages_that_come_back_to_their_addresses(
    mesh: Mesh, cuda: Device, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given back and taken again: the same tokens, and a graph captured anew only where pages have moved."""
    mesh = start_mesh()
    cuda.reuses_blocks, cuda.free_bytes = same, 2**20
    sampler = sampler_of(small_model(mesh), mesh, kv_memory_mb="auto")
    first = sampler.generate(requests(), PARAMS)
    before, held = sampler.pages.addresses, sampler.kv_bytes_held
    allocated, steps, captured = cuda.allocated_bytes, sampler.steps, []
    assert steps is not None
    capture = steps.capture
    monkeypatch.setattr(steps, "capture", lambda run: captured.append(run) or capture(run))
    sampler.give_back()
    gc.collect()
    assert sampler.kv_bytes_held == 0 and cuda.allocated_bytes == allocated - held
    with cuda.watch() as seen:
        assert bits(sampler.generate(requests(), PARAMS)) == bits(first)
    assert (sampler.pages.addresses == before) is same
    # Captured anew, a step is replayed as well: its kernels are compiled already.
    assert seen["replay"] == PARAMS.max_new_tokens - 1
    assert seen["empty_cache"] == 0
    sampler.generate(requests(), PARAMS)
    assert len(captured) == (0 if same else 1)
