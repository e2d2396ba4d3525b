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

from sip_engine.config import ParallelConfig, SamplerConfig
from sip_engine.errors import RequestError
from sip_engine.mesh import Mesh, start_mesh
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.sampler import Completion, Request, Sampler, SamplingParams

VOCAB = 90  # not a multiple of the padding, so that padded rows would show
LENGTHS = (1, 7, 16, 17, 33)
PARAMS = SamplingParams(max_new_tokens=19, seed=3)


def make_model(mesh: Mesh) -> PolicyModel:
    return build_model(SMALL_MODEL, ParallelConfig(tensor=mesh.tp.size), VOCAB, mesh, seed=1)


def make_sampler(model: PolicyModel, mesh: Mesh, impl=None, **settings) -> Sampler:
    views = weight_views(model, VOCAB, mesh.tp.rank)
    return Sampler(views, mesh.tp, SamplerConfig(**{"kv_memory_mb": 4, **settings}), impl=impl)


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
    done = make_sampler(model, mesh, impl).generate(requests(1), replace(PARAMS, temperature=0.0))
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


@pytest.mark.parametrize("impl", ["dense", "reference"])
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
        (one([1], n=300), {}, "sampler.max_sequences"),
        (one([1]), {"temperature": -0.5}, "temperature=-0.5"),
        (one([1]), {"temperature": float("nan")}, "temperature=nan"),
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
    with pytest.raises(RequestError, match=r"raise sampler\.kv_memory_mb"):
        sampler.generate([one([1] * 70, n=1000)], PARAMS)


def sample_on_ranks(folder: Path, tensor: str) -> None:
    """On every rank: completions of the shared model, sampled at a tensor-parallel size."""
    mesh = start_mesh(int(tensor))
    sampler = make_sampler(make_model(mesh), mesh)
    results = [
        [
            (c.ids.tolist(), c.logprobs.tolist())
            for group in sampler.generate(requests(), params)
            for c in group
        ]
        for params in (PARAMS, replace(PARAMS, top_k=7, top_p=0.9))
    ]
    (folder / f"{mesh.rank}.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_two_shards_sample_what_one_does(mesh: Mesh, model: PolicyModel, tmp_path: Path) -> None:
    run_ranks("test_sampler:sample_on_ranks", 2, tmp_path, "2")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    sampler = make_sampler(model, mesh)
    for got, params in zip(ranks[0], (PARAMS, replace(PARAMS, top_k=7, top_p=0.9)), strict=True):
        want = [c for group in sampler.generate(requests(), params) for c in group]
        for (ids, logprobs), completion in zip(got, want, strict=True):
            assert ids == completion.ids.tolist()
            np.testing.assert_allclose(logprobs, completion.logprobs, atol=1e-5)
