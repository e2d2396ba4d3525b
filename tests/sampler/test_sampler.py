"""The sampler against transformers' Llama: tokens, log-probs, independence of batching, stopping, bad requests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL
from llama import llama_logprobs, llama_of
from ranks import run_ranks

from sip_engine.config.schema import ParallelConfig, SamplerConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.attention import KVPages
from sip_engine.sampler.continuous import decode_continuously
from sip_engine.sampler.draw import TokenDraw
from sip_engine.sampler.pages import RollingPages
from sip_engine.sampler.requests import Completion, Request, SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.utils.errors import RequestError

VOCAB = 90  # not a multiple of the padding, so that padded rows would show
LENGTHS = (1, 7, 16, 17, 33)
PARAMS = SamplingParams(max_new_tokens=19, seed=3)


def make_model(mesh: Mesh) -> PolicyModel:
    return build_model(
        SMALL_MODEL, ParallelConfig(tensor=mesh.tp.size, pipeline=mesh.pp.size), VOCAB, mesh, seed=1
    )


def make_sampler(model: PolicyModel, mesh: Mesh, impl=None, **settings) -> Sampler:
    views = weight_views(model, VOCAB, mesh.tp.rank)
    return Sampler(views, mesh, SamplerConfig(**{"kv_memory_mb": 4, **settings}), impl=impl)


def requests(n: int = 3) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(rng.integers(0, VOCAB, size).astype(np.int32), n, document=size, start=2 * size)
        for size in LENGTHS
    ]


@pytest.fixture(scope="module")
def model(mesh: Mesh) -> PolicyModel:
    return make_model(mesh)


def tokens(done: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.ids.tolist() for c in group] for group in done]


@pytest.mark.parametrize("impl", ["dense", "reference"])
def test_greedy_tokens_equal_transformers(mesh: Mesh, model: PolicyModel, impl: str) -> None:
    llama = llama_of(model, VOCAB)
    done = make_sampler(model, mesh, impl).generate(requests(1), replace(PARAMS, greedy=True))
    for request, (completion,) in zip(requests(1), done, strict=True):
        prompt = torch.from_numpy(request.prefix_ids).long()[None]
        want = llama.generate(  # pyright: ignore[reportAttributeAccessIssue]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=19,
            do_sample=False,
            eos_token_id=None,
        )
        assert completion.ids.tolist() == want[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("impl", ["dense", "reference", "exact"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}])
def test_logprobs_equal_transformers(mesh: Mesh, model: PolicyModel, impl: str, settings: dict) -> None:
    """Whatever cuts or sharpens the distribution, the returned log-probs are the policy's own."""
    llama = llama_of(model, VOCAB)
    done = make_sampler(model, mesh, impl).generate(requests(), replace(PARAMS, **settings))
    for request, group in zip(requests(), done, strict=True):
        for completion in group:
            with torch.no_grad():
                want = llama_logprobs(llama, request.prefix_ids.tolist(), completion.ids.tolist())
            np.testing.assert_allclose(completion.logprobs, want.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("settings", "limit"), [({"top_k": 3}, 3), ({"top_p": 0.3}, None)])
def test_cut_off_tokens_are_never_sampled(
    mesh: Mesh, model: PolicyModel, settings: dict, limit: int | None
) -> None:
    llama = llama_of(model, VOCAB)
    (group,) = make_sampler(model, mesh).generate([requests(8)[1]], replace(PARAMS, **settings))
    prefix = requests()[1].prefix_ids.tolist()
    for completion in group:
        ids = torch.tensor([prefix + completion.ids.tolist()])
        with torch.no_grad():
            probs = llama(ids).logits[0, len(prefix) - 1 : -1].softmax(-1)
        for row, token in zip(probs, completion.ids.tolist(), strict=True):
            above = row[row > row[token]]
            assert len(above) < limit if limit else above.sum() < 0.3


def test_filters_draw_from_logits_that_are_not_rounded_to_16_bits(mesh: Mesh) -> None:
    """Logits of tens, whose neighbours in bf16 are an eighth apart; the log-prob is of the whole distribution."""
    small = SMALL_MODEL.model_copy(update={"precision": "bf16"})
    weights = weight_views(build_model(small, ParallelConfig(), 101, mesh, seed=3), 101, mesh.tp.rank)
    assert weights.head is not None and weights.head.dtype == torch.bfloat16
    head = torch.randn(weights.head.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    hidden = 2 * torch.randn(64, head.shape[1], generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    numbers = torch.arange(64)
    draw = TokenDraw(replace(weights, head=head), mesh.tp)
    ids, logprobs = draw(hidden, numbers, numbers, SamplingParams(max_new_tokens=1, top_k=20))
    logits = (hidden.double() @ head.double().T)[:, :101]
    assert logits.abs().max() > 30
    expected = logits.log_softmax(dim=1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["dense", "reference"])
@pytest.mark.parametrize(
    "settings",
    [{"max_sequences": 3}, {"max_sequences": 7, "page_size": 5}, {"kv_memory_mb": 1}, {"page_size": 64}],
)
def test_tokens_do_not_depend_on_waves_or_order(
    mesh: Mesh, model: PolicyModel, impl: str, settings: dict
) -> None:
    want = tokens(make_sampler(model, mesh).generate(requests(), PARAMS))
    sampler = make_sampler(model, mesh, impl, **settings)
    assert tokens(sampler.generate(requests()[::-1], PARAMS))[::-1] == want
    assert tokens(sampler.generate(requests()[2:3], PARAMS)) == want[2:3]
    assert sampler.pages_in_use == 0


def test_more_rollouts_keep_the_first(mesh: Mesh, model: PolicyModel) -> None:
    sampler = make_sampler(model, mesh)
    few, many = (sampler.generate([requests(n)[3]], PARAMS)[0] for n in (2, 5))
    assert [c.ids.tolist() for c in many[:2]] == [c.ids.tolist() for c in few]
    assert len({tuple(c.ids) for c in many}) == 5


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 1}, {"temperature": 2.0}])
def test_other_seeds_and_steps_give_other_tokens(mesh: Mesh, model: PolicyModel, change: dict) -> None:
    sampler = make_sampler(model, mesh)
    first = tokens(sampler.generate(requests(), PARAMS))
    assert tokens(sampler.generate(requests(), replace(PARAMS, **change))) != first


def test_stop_tokens_end_a_completion_and_are_kept(mesh: Mesh, model: PolicyModel) -> None:
    sampler = make_sampler(model, mesh)
    whole = sampler.generate(requests(), PARAMS)
    stop = int(whole[0][0].ids[4])
    stopped = sampler.generate(requests(), replace(PARAMS, stop_ids=(stop,)))
    for before, after in zip(whole, stopped, strict=True):
        for long, short in zip(before, after, strict=True):
            ids = long.ids.tolist()
            end = ids.index(stop) + 1 if stop in ids else len(ids)
            assert short.ids.tolist() == ids[:end]
            np.testing.assert_allclose(short.logprobs, long.logprobs[:end], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "preempt_every"),
    [
        ({}, 0),
        ({"max_sequences": 4}, 0),
        ({"kv_memory_mb": 1, "page_size": 4}, 0),
        ({}, 2),
        ({"page_size": 3}, 1),
    ],
)
def test_continuous_batching_draws_the_same_tokens(
    mesh: Mesh, model: PolicyModel, settings: dict, preempt_every: int
) -> None:
    """Sequences that leave at a stop token, wait for room or have to start over end as they do in a wave."""
    whole = make_sampler(model, mesh).generate(requests(), PARAMS)
    params = replace(PARAMS, stop_ids=tuple(int(group[0].ids[3 * i]) for i, group in enumerate(whole)))
    want = make_sampler(model, mesh).generate(requests(), params)
    assert len({len(c.ids) for group in want for c in group}) > 3
    sampler = make_sampler(model, mesh, "reference", **settings)
    assert sampler.draw is not None
    got = decode_continuously(
        sampler.decoder,
        sampler.draw,
        sampler.pages,
        "reference",
        requests(),
        params,
        sampler.limits,
        preempt_every=preempt_every,
    )
    assert tokens(got) == tokens(want)
    for ours, theirs in zip(got, want, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert sampler.pages_in_use == 0


def test_continuous_batching_gives_way_when_pages_run_out(mesh: Mesh, model: PolicyModel) -> None:
    """A pool that holds one group at full length and little more: the others enter, give way, and finish."""
    need = make_sampler(model, mesh).limits.group_pages(33, 3, 19)
    sampler = make_sampler(model, mesh, "reference")
    small = replace(sampler.limits, num_pages=need + 2)
    pages = KVPages(sampler.weights, small.num_pages, small.page_size, torch.float32)
    assert sampler.draw is not None
    admitted = []
    step = RollingPages.step

    def counting(rows: RollingPages) -> int:
        short = step(rows)
        admitted.append(short)
        return short

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(RollingPages, "step", counting)
        got = decode_continuously(
            sampler.decoder, sampler.draw, pages, "reference", requests(), PARAMS, small
        )
    assert max(admitted) > 0, "no page was ever missing"
    assert tokens(got) == tokens(make_sampler(model, mesh).generate(requests(), PARAMS))
    assert pages.pool.allocator.num_used == 0


def test_fp8_pages_hold_twice_the_tokens_and_drift_a_little(mesh: Mesh, model: PolicyModel) -> None:
    """Four-bit mantissas: log-probs stay within a few hundredths, far from what fp32 pages keep to."""
    llama = llama_of(model, VOCAB)
    fp8, fp32 = make_sampler(model, mesh, kv_dtype="fp8"), make_sampler(model, mesh)
    assert fp8.limits.num_pages == 4 * fp32.limits.num_pages  # of float32 weights
    gaps = []
    for request, group in zip(requests(), fp8.generate(requests(), PARAMS), strict=True):
        for completion in group:
            with torch.no_grad():
                want = llama_logprobs(llama, request.prefix_ids.tolist(), completion.ids.tolist())
            gaps.append(np.abs(completion.logprobs - want.numpy()).mean())
    assert 1e-4 < np.mean(gaps) < 0.05


@pytest.mark.parametrize("impl", ["dense", "reference"])
def test_a_wave_holds_each_prefix_once(mesh: Mesh, model: PolicyModel, impl: str) -> None:
    """Pages in use: prefixes x ceil(P / page) + sequences x ceil(S / page) throughout, 0 afterwards."""
    sampler = make_sampler(model, mesh, impl, page_size=8)
    seen = []
    forward = sampler.decoder.forward

    def watching(*args):
        seen.append(sampler.pages_in_use)
        return forward(*args)

    sampler.decoder.forward = watching  # type: ignore[method-assign]
    sampler.generate(requests(), PARAMS)
    want = sum(-(-n // 8) for n in LENGTHS) + 3 * len(LENGTHS) * -(-19 // 8)
    assert seen == [want] * 19
    assert sampler.pages_in_use == 0


def one(ids: list[int], n: int = 1) -> Request:
    return Request(np.array(ids, np.int32), n)


@pytest.mark.parametrize(
    ("request_", "params", "words"),
    [
        (one([]), {}, "empty prompt"),
        (one([1], n=0), {}, "n=0"),
        (one([1] * 90), {}, "context of 96"),
        (one([1, VOCAB]), {}, f"token id {VOCAB} is outside"),
        (one([1, -1]), {}, "token id -1 is outside"),
        (one([1], n=300), {}, "max_sequences of the sampler"),
        (one([1]), {"temperature": -0.5}, "temperature=-0.5"),
        (one([1]), {"temperature": 0.0}, "temperature=0.0: must be finite and at least 1e-06"),
        (one([1]), {"temperature": float("nan")}, "temperature=nan"),
        (one([1]), {"temperature": float("inf")}, "temperature=inf"),
        (one([1]), {"temperature": 1e-30}, "temperature=1e-30"),
        (one([1]), {"top_p": 0.0}, "top_p=0.0"),
        (one([1]), {"top_p": 1.5}, "top_p=1.5"),
        (one([1]), {"top_k": -1}, "top_k=-1"),
        (one([1]), {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_requests_are_refused_before_any_page_is_taken(
    mesh: Mesh, model: PolicyModel, request_: Request, params: dict, words: str
) -> None:
    sampler = make_sampler(model, mesh)
    with pytest.raises(RequestError, match=words):
        sampler.generate([requests()[0], request_], replace(PARAMS, **params))
    assert sampler._pages is None


def test_a_budget_too_small_for_one_group_is_refused(mesh: Mesh, model: PolicyModel) -> None:
    sampler = make_sampler(model, mesh, kv_memory_mb=1, max_sequences=4096)
    with pytest.raises(RequestError, match=r"raise kv_memory_mb"):
        sampler.generate([one([1] * 70, n=1000)], PARAMS)


def bits(done: list[list[Completion]]) -> list[tuple[list[int], bytes]]:
    """Tokens and the very bits of their log-probs."""
    return [(c.ids.tolist(), c.logprobs.tobytes()) for group in done for c in group]


def alone_and_together(mesh: Mesh, model: PolicyModel, impl: str) -> tuple[list, list]:
    """Completions of each request sampled by itself, and of all in one batch in another order."""
    alone = [group for r in requests() for group in make_sampler(model, mesh, impl).generate([r], PARAMS)]
    sampler = make_sampler(model, mesh, impl, page_size=7)
    return bits(alone), bits(sampler.generate(requests()[::-1], PARAMS)[::-1])


def test_batch_invariant_mode_has_the_same_bits_in_any_batch(mesh: Mesh, model: PolicyModel) -> None:
    alone, together = alone_and_together(mesh, model, "exact")
    assert alone == together


def test_the_bits_of_the_fast_path_do_depend_on_the_batch(mesh: Mesh, model: PolicyModel) -> None:
    """So that the test above can fail: the tokens are the same, the last bits of the log-probs are not."""
    alone, together = alone_and_together(mesh, model, "dense")
    assert [ids for ids, _ in alone] == [ids for ids, _ in together]
    assert alone != together


def sample_on_ranks(folder: Path, tensor: str, pipeline: str) -> None:
    """On every rank: completions of the shared model, sampled at a layout."""
    mesh = start_mesh(int(tensor), int(pipeline))
    sampler = make_sampler(make_model(mesh), mesh)
    results = [
        [
            (c.ids.tolist(), c.logprobs.tolist())
            for group in sampler.generate(requests(), params)
            for c in group
        ]
        for params in VARIANTS
    ]
    exact = make_sampler(make_model(mesh), mesh, batch_invariant=True).generate(requests(), PARAMS)
    results.append([(c.ids.tolist(), c.logprobs.tobytes().hex()) for group in exact for c in group])
    (folder / f"{mesh.rank}.json").write_text(json.dumps(results))


VARIANTS = (PARAMS, replace(PARAMS, top_k=7, top_p=0.9), replace(PARAMS, stop_ids=tuple(range(0, 90, 9))))


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_every_layout_samples_what_one_process_does(
    mesh: Mesh, model: PolicyModel, tmp_path: Path, tensor: int, pipeline: int
) -> None:
    size = tensor * pipeline
    run_ranks("test_sampler:sample_on_ranks", size, tmp_path, str(tensor), str(pipeline))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    assert all(rank == ranks[0] for rank in ranks)
    sampler = make_sampler(model, mesh)
    exact = bits(make_sampler(model, mesh, batch_invariant=True).generate(requests(), PARAMS))
    assert [(ids, bytes.fromhex(logprobs)) for ids, logprobs in ranks[0].pop()] == exact, "not bitwise"
    for got, params in zip(ranks[0], VARIANTS, strict=True):
        want = [c for group in sampler.generate(requests(), params) for c in group]
        for (ids, logprobs), completion in zip(got, want, strict=True):
            assert ids == completion.ids.tolist()
            np.testing.assert_allclose(logprobs, completion.logprobs, atol=1e-5)
