"""A model as judge inside the engine, on the emulated device: the CPU's answers, and what the host waits for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL_MODEL
from emulated_cuda import Device, emulated_cuda

from sip_engine.config.judge import LocalModelConfig
from sip_engine.config.schema import ParallelConfig, SamplerConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.judges.local import LocalJudge
from sip_engine.llm.local_model import LocalModel
from sip_engine.policy.model import build_model
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.types import FactualityQuestion, Failure, Judgment, PairQuestion, Question, SafetyQuestion

QUESTIONS: list[Question] = [
    PairQuestion("the fox", " jumps", " sleeps over"),
    PairQuestion("the fox", " jumps over", " a dog"),
    SafetyQuestion(" the lazy dog"),
    FactualityQuestion("the fox", " jumps", " sleeps"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["the quick brown fox jumps over the lazy dog, yes no 1 2 none possible definite"] * 20
    return Tokenizer.train(texts, 300, tmp_path_factory.mktemp("judge") / "tokenizer.model")


@pytest.fixture
def cuda() -> Iterator[Device]:
    with emulated_cuda() as device:
        yield device


def local_model(mesh: Mesh, tokenizer: Tokenizer, **settings) -> LocalModel:
    shape = SMALL_MODEL.model_copy(update={"num_layers": 1, "max_context": 80, "precision": "fp32"})
    model = build_model(shape, ParallelConfig(), tokenizer.vocab_size, mesh, seed=3)
    policy = FrozenPolicy(model.requires_grad_(False), tokenizer, mesh)
    values = {"max_new_tokens": 6, "kv_memory_mb": 1, "checkpoint": Path("nowhere")}
    return LocalModel(policy, LocalModelConfig(**values | settings))


def numbers(found: list[Judgment]) -> list[float | str]:
    return [one.reason if isinstance(one, Failure) else one.value for one in found]


@pytest.mark.parametrize("method", ["log_odds", "sentence_labels", "mutual_information"])
def test_read_verdicts_are_the_cpus(mesh: Mesh, tokenizer: Tokenizer, method: str) -> None:
    """Triton's kernels over packed rows; the host waits for the micro-batch's answers alone."""
    want = LocalJudge(local_model(mesh, tokenizer, method=method)).judge(QUESTIONS)
    with emulated_cuda() as cuda:
        judge = LocalJudge(local_model(start_mesh(), tokenizer, method=method))
        with cuda.watch() as seen:
            found = judge.judge(QUESTIONS)
    for ours, theirs in zip(numbers(found), numbers(want), strict=True):
        assert ours == (theirs if isinstance(theirs, str) else pytest.approx(theirs, abs=2e-5))
    assert any(isinstance(one, float) and 0 < one < 1 for one in numbers(want)) or method != "log_odds"
    assert [one.cost.tokens for one in found] == [one.cost.tokens for one in want]
    assert seen["triton"] > 0
    assert seen["synchronise"] == 1, seen.places["synchronise"]
    (place,) = seen.places["synchronise"]
    assert place.startswith(("sip_engine/llm/option_probs.py", "sip_engine/sampler/frozen.py"))


def test_written_replies_are_the_cpus(mesh: Mesh, cuda: Device, tokenizer: Tokenizer) -> None:
    """By continuous batching with graphs: the host never waits for a step."""
    settings = {"method": "generate", "temperature": 1.0, "max_new_tokens": 4}
    on_cpu, model = (local_model(m, tokenizer, **settings) for m in (mesh, start_mesh()))
    prompts = [on_cpu.encode(text) for text in ("the quick fox", "no")]
    asked = [Request(ids, 1, number) for number, ids in enumerate(prompts) if ids is not None]
    params = SamplingParams(4, seed=4, stop_ids=on_cpu.tokenizer.eos_ids)
    with cuda.watch() as seen:
        replies = model.sampler.generate(asked, params)
    want = on_cpu.sampler.generate(asked, params)
    assert [c.ids.tolist() for (c,) in replies] == [c.ids.tolist() for (c,) in want]
    assert seen["synchronise"] == 0 and seen["replay"] > 0
    assert seen["read"] == seen["wait"]
    assert model.sampler.pages_in_use == 0
    answers = LocalJudge(model).judge(QUESTIONS[:1], seed=4)
    assert numbers(answers) == numbers(LocalJudge(on_cpu).judge(QUESTIONS[:1], seed=4))


def test_judge_and_policy_take_turns_on_one_device(
    mesh: Mesh, cuda: Device, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge's pages are its own: the policy's rollouts are the same before and after it wrote, and its memory
    is not given back with theirs.
    """
    monkeypatch.setenv("SIP_KERNELS", "reference")
    on_device = start_mesh()
    judge = local_model(on_device, tokenizer, method="generate")
    cuda.free_bytes = 2**20
    sampler = judge.policy.sampler(SamplerConfig(kv_memory_mb="auto", page_size=4))
    ids = judge.encode("the quick fox")
    assert ids is not None
    ask, params = [Request(ids, 3, 7)], SamplingParams(4, seed=1)
    before = [c.ids.tolist() for c in sampler.generate(ask, params)[0]]
    written = judge.reply([ids], seed=0)
    held = judge.sampler.kv_bytes_held
    sampler.give_back()
    gc.collect()
    assert sampler.kv_bytes_held == 0 and judge.sampler.kv_bytes_held == held > 0
    assert judge.reply([ids], seed=0) == written
    assert [c.ids.tolist() for c in sampler.generate(ask, params)[0]] == before
