"""Mutual information as a judge: against transformers, through a server, in what it costs and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, small_run
from fault_server import FaultServer
from llama import llama_of

from sip_engine.config.judge import JudgeServerConfig, LocalModelConfig
from sip_engine.config.parse import parse_config
from sip_engine.config.schema import ParallelConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.judges.local import LocalJudge
from sip_engine.judges.mutual_information import LocalReader, Reading, TokenLogProbs, mean_gain
from sip_engine.judges.server import ServerJudge
from sip_engine.llm.completion import read_echo
from sip_engine.llm.local_model import LocalModel
from sip_engine.policy.model import build_model
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.types import (
    Cost,
    FactualityQuestion,
    Failure,
    Judgment,
    PairQuestion,
    Question,
    SafetyQuestion,
    Score,
)
from sip_engine.utils.errors import ConfigError

SUFFIXES = [
    " jumps over the lazy dog",
    " sleeps",
    " dog dog dog dog",
    " and a fox, 12 of them.",
    " q\u00e9\u2581x",
]
PREFIXES = ["the quick brown fox", "a dog.\n"]
ORIGINAL = " sleeps over the dog"


@pytest.fixture(scope="module")
def policy(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> FrozenPolicy:
    texts = ["the quick brown fox jumps over the lazy dog and sleeps 12 of them"] * 20
    tokenizer = Tokenizer.train(texts, 300, tmp_path_factory.mktemp("information") / "tokenizer.model")
    shape = SMALL_MODEL.model_copy(update={"max_context": 128})
    model = build_model(shape, ParallelConfig(), tokenizer.vocab_size, mesh, seed=4)
    return FrozenPolicy(model.requires_grad_(False), tokenizer, mesh)


@pytest.fixture(scope="module")
def logprobs(policy: FrozenPolicy) -> Callable[[str, str], np.ndarray]:
    """(context, suffix) -> log-probs of the suffix's own tokens behind it, by transformers."""
    llama, tokenizer = llama_of(policy.model, policy.tokenizer.vocab_size), policy.tokenizer

    def of(context: str, suffix: str) -> np.ndarray:
        own = tokenizer.encode(suffix).tolist()
        ids = [tokenizer.bos_id, *(tokenizer.encode(context).tolist() if context else []), *own]
        with torch.no_grad():
            table = torch.log_softmax(llama(torch.tensor([ids])).logits[0].double(), dim=-1)
        start = len(ids) - len(own)
        return np.array([float(table[start + n - 1, token]) for n, token in enumerate(own)])

    return of


def judge(policy: FrozenPolicy, **settings: Any) -> LocalJudge:
    return LocalJudge(
        LocalModel(policy, LocalModelConfig(method="mutual_information", **{"copied_run": 0, **settings}))
    )


def value(judgment: Judgment) -> float:
    assert isinstance(judgment, Score), judgment
    return judgment.value


@pytest.mark.parametrize("micro_batch_tokens", [16384, 40])
def test_it_equals_transformers(
    policy: FrozenPolicy,
    logprobs: Callable[[str, str], np.ndarray],
    micro_batch_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each suffix by itself, token by token, whatever travels together in one row."""
    monkeypatch.setattr(policy, "micro_batch_tokens", micro_batch_tokens)
    quality = {(p, s): float((logprobs(p, s) - logprobs("", s)).mean()) for p in PREFIXES for s in SUFFIXES}
    note = ORIGINAL.strip() + "\n\n"
    # The note's tokens and the prefix's are joined, never merged.
    encode = policy.tokenizer.encode
    assert (np.concatenate([encode(note), encode(PREFIXES[0])]) == encode(note + PREFIXES[0])).all()
    gain = {
        (p, s): float((logprobs(note + p, s) - logprobs(p, s)).mean()) for p in PREFIXES for s in SUFFIXES
    }
    pairs = [PairQuestion(p, a, b) for p in PREFIXES for a in SUFFIXES for b in SUFFIXES if a != b]
    facts = [FactualityQuestion(p, ORIGINAL, s) for p in PREFIXES for s in SUFFIXES]
    found = judge(policy, pair_temperature=0.5).judge([*pairs, *facts])
    outright = judge(policy).judge(pairs)
    for pair, soft, hard in zip(pairs, found, outright, strict=False):
        difference = quality[pair.prefix, pair.first] - quality[pair.prefix, pair.second]
        assert abs(difference) > 1e-4
        assert value(soft) == pytest.approx(1 / (1 + math.exp(-difference / 0.5)), abs=1e-5)
        assert value(hard) == float(difference > 0)
    for fact, answer in zip(facts, found[len(pairs) :], strict=True):
        want = 1 / (1 + math.exp(-gain[fact.prefix, fact.suffix]))
        assert value(answer) == pytest.approx(want, abs=1e-5)


def test_each_candidate_is_read_once_and_its_prefix_once_for_all(policy: FrozenPolicy) -> None:
    pairs = [PairQuestion(PREFIXES[0], a, b) for a in SUFFIXES for b in SUFFIXES if a < b]
    subject = judge(policy)
    found = subject.judge(pairs)
    encode = policy.tokenizer.encode
    own = sum(len(encode(suffix)) for suffix in SUFFIXES)
    spent = sum((answer.cost for answer in found), Cost())
    assert spent.calls == 2 * len(SUFFIXES), "once alone and once after the prefix"
    read = 2 * own + 2 + len(encode(PREFIXES[0]))  # two times bos
    assert abs(spent.tokens - read) <= len(SUFFIXES), "costs are rounded to whole tokens"
    again = subject.judge([*pairs, PairQuestion(PREFIXES[0], SUFFIXES[0], " new")])
    assert [value(one) for one in again[:-1]] == [value(one) for one in found]
    assert [one.cost.calls for one in again] == [0] * len(pairs) + [2]


def test_what_copies_the_prefix_earns_nothing(
    policy: FrozenPolicy, logprobs: Callable[[str, str], np.ndarray]
) -> None:
    """The tokens of a run count 0 at most, the others in full; with 0, and of factuality, all do."""
    prefix, run = "the quick brown fox saw it", 6
    copy, encode = " brown fox saw it and then", policy.tokenizer.encode
    ids, before = encode(copy).tolist(), encode(prefix).tolist()
    windows = {tuple(before[at : at + run]) for at in range(len(before))}
    inside = [at for at in range(len(ids)) if tuple(ids[at : at + run]) in windows]
    is_copied = [any(at <= token < at + run for at in inside) for token in range(len(ids))]
    assert 0 < sum(is_copied) < len(ids)
    gains = logprobs(prefix, copy) - logprobs("", copy)
    guarded = np.where(is_copied, np.minimum(gains, 0.0), gains).mean()
    assert abs(guarded - gains.mean()) > 1e-4
    other = " and then"
    rest = (logprobs(prefix, other) - logprobs("", other)).mean()
    for copied_run, wanted in ((run, guarded), (0, gains.mean()), (len(ids) + 1, gains.mean())):
        subject = judge(policy, pair_temperature=1.0, copied_run=copied_run)
        (pair,) = subject.judge([PairQuestion(prefix, copy, other)])
        assert value(pair) == pytest.approx(1 / (1 + math.exp(rest - wanted)), abs=1e-5)
    facts = [FactualityQuestion(prefix, copy, copy)]
    assert [value(judge(policy, copied_run=n).judge(facts)[0]) for n in (0, run)] == [
        value(judge(policy, copied_run=0).judge(facts)[0])
    ] * 2


def test_a_long_prefix_keeps_its_end(
    policy: FrozenPolicy, logprobs: Callable[[str, str], np.ndarray]
) -> None:
    """Context 128: of 200 tokens those stay that fit, a multiple of 64 of them; nothing is refused for its length."""
    reader, encode = LocalReader(LocalModel(policy, LocalModelConfig())), policy.tokenizer.encode
    prefix = "q" * 200
    assert len(encode(prefix)) == 200
    short, long = " dog" * 3, "z" * 100
    found = reader.read(
        [Reading("", prefix, short), Reading("", prefix, long), Reading("", prefix, "z" * 128)]
    )
    for one, suffix, kept in zip(found, (short, long), (64, 27), strict=False):
        assert isinstance(one, TokenLogProbs)
        assert one.logprobs == pytest.approx(logprobs("q" * kept, suffix), abs=1e-5)
    assert isinstance(found[2], Failure) and "longer than the judge's context" in found[2].reason


def test_nothing_to_read_and_nothing_to_say(policy: FrozenPolicy) -> None:
    subject = judge(policy, pair_temperature=1.0)
    empty, same, safe, unknown = subject.judge(
        [
            PairQuestion("p", "", " dog"),
            PairQuestion("p", " dog", " dog"),
            SafetyQuestion(" dog"),
            FactualityQuestion("p", " \n", " dog"),
        ]
    )
    assert value(empty) == 0.0 and value(same) == 0.5
    assert isinstance(safe, Failure) and "nothing of safety" in safe.reason
    assert isinstance(unknown, Failure) and "original is blank" in unknown.reason
    assert value(subject.judge([FactualityQuestion("p", "fox", "")])[0]) == 0.0


@pytest.mark.parametrize(
    ("judged", "task", "remedy"),
    [
        (
            {"local": {"method": "mutual_information", "checkpoint": "ck"}},
            "policy",
            "set judge.weights.safety = 0",
        ),
        (
            {"server": {"method": "mutual_information", "url": "http://127.0.0.1:1/v1", "model": "m"}},
            "policy",
            "set judge.weights.safety = 0",
        ),
    ],
)
def test_safety_is_refused_with_the_remedy(judged: dict[str, Any], task: str, remedy: str) -> None:
    values = {"judge": {"backend": next(iter(judged)), **judged}, "task": task, "data": {"path": "d.txt"}}
    with pytest.raises(ConfigError, match=remedy):
        parse_config(values, "run.toml")
    values["judge"]["weights"] = {"safety": 0.0}
    assert parse_config(values, "run.toml").judge.mutual_information
    assert not small_run().judge.mutual_information


# ---- through a server


class EchoServer(FaultServer):
    """Completions of one token whose prompt is echoed with its log-probs: by `logprobs` of (token, log-prob)."""

    def __init__(
        self, model: Callable[[str], Sequence[tuple[str, float | None]]], form: str = "logprobs"
    ) -> None:
        self.model, self.form = model, form
        super().__init__(lambda body: "")
        self._http.RequestHandlerClass._reply = lambda handler, step, body: self.reply(body)  # type: ignore[attr-defined]

    def reply(self, body: dict[str, Any]) -> bytes:
        pairs = list(self.model(body["prompt"]))
        usage = {"prompt_tokens": len(pairs), "completion_tokens": 1}
        if self.form == "prompt_logprobs":
            table = [{token: {"logprob": p}} if p is not None else None for token, p in pairs]
            return json.dumps({"choices": [{"prompt_logprobs": table}], "usage": usage}).encode()
        tokens, values = zip(*pairs, ("more", -9.0), strict=True)
        logprobs = {"tokens": tokens, "token_logprobs": values} if self.form == "logprobs" else None
        return json.dumps({"choices": [{"text": "", "logprobs": logprobs}], "usage": usage}).encode()


def settings(server: FaultServer, **changes: Any) -> JudgeServerConfig:
    values = {"url": server.url, "model": "m", "method": "mutual_information", "request_s": 20}
    return JudgeServerConfig.model_validate(values | changes)


def characters(policy: FrozenPolicy, logprobs: Callable[[str, str], np.ndarray]) -> Callable[[str], Any]:
    """A served model: the policy's own tokens, bos among them, named as a server names them."""
    tokenizer = policy.tokenizer

    def model(prompt: str) -> list[tuple[str, float | None]]:
        names = [f"token_id:{token}" for token in tokenizer.encode(prompt).tolist()]
        return [("<s>", None), *zip(names, logprobs("", prompt).tolist(), strict=True)]

    return model


@pytest.mark.parametrize("form", ["logprobs", "prompt_logprobs"])
def test_a_server_gives_what_the_engine_gives(
    policy: FrozenPolicy, logprobs: Callable[[str, str], np.ndarray], form: str
) -> None:
    questions: list[Question] = [
        *(PairQuestion(p, a, b) for p in PREFIXES for a in SUFFIXES[:4] for b in SUFFIXES[:4] if a != b),
        *(FactualityQuestion(p, ORIGINAL, s) for p in PREFIXES for s in SUFFIXES[:4]),
    ]
    with EchoServer(characters(policy, logprobs), form) as server:
        subject = ServerJudge(settings(server, pair_temperature=0.3, copied_run=4))
        found = subject.judge(questions)
        asked = [body["prompt"] for body in server.bodies]
    local = judge(policy, pair_temperature=0.3, copied_run=4).judge(questions)
    for one, other in zip(found, local, strict=True):
        assert value(one) == pytest.approx(value(other), abs=1e-5)
    assert len(asked) == len(set(asked)) == 4 + 2 * 4 + 2 * 4, "alone, after its prefix, behind the original"
    assert {"echo": True, "logprobs": 1, "max_tokens": 1, "model": "m"}.items() <= server.bodies[0].items()
    assert subject.deterministic and sum(one.cost.calls for one in found) == len(asked)


def test_only_tokens_that_all_readings_have_alike_count() -> None:
    """A server's first token may have no log-prob, and a border may fall within a token."""

    def read(*pairs: tuple[Hashable, float]) -> TokenLogProbs:
        return TokenLogProbs(tuple(t for t, _ in pairs), np.array([p for _, p in pairs]), Cost())

    alone = read(("ly", math.nan), ("nice", -5.0), (".", -2.0))
    after = read(("friend", -1.0), ("ly", -0.5), ("nice", -3.0), (".", -1.0))
    assert mean_gain(alone, alone, after) == pytest.approx((2.0 + 1.0) / 2)
    merged = read(("friendly", -1.0), ("nice", -3.0), (".", -1.0))
    assert mean_gain(alone, alone, merged) == pytest.approx(1.5)
    # The prefix's own tokens never count, also where both readings have the prefix.
    assert mean_gain(
        alone, after, read(("friend", -9.0), *zip(after.tokens[1:], [-0.5, -2.0, -1.0], strict=True))
    ) == (pytest.approx(0.5))
    other = read(("x", -1.0))
    assert isinstance(mean_gain(alone, alone, other), Failure)
    # Of a server, what stands before the suffix is within what it read.
    again = read(*zip("abcdab", [-1.0, -2.0, -3.0, -4.0, -0.5, -0.25], strict=True))
    bare = read(("a", -3.0), ("b", -2.0))
    assert mean_gain(bare, bare, again) == pytest.approx((2.5 + 1.75) / 2)
    assert mean_gain(bare, bare, again, 2) == 0.0
    assert mean_gain(bare, bare, again, 3) == pytest.approx((2.5 + 1.75) / 2)
    assert mean_gain(alone, Failure("lost"), after) == Failure("lost")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>Sign in</html>", "not a completion; it said: Sign in"),
        (b'{"choices": [{"text": "x"}], "usage": {"prompt_tokens": 2}}', "gives no log-probs of the prompt"),
        (
            b'{"choices": [{"logprobs": {"content": [{"token": "x", "logprob": -1}]}}]}',
            "gives no log-probs of the prompt",
        ),
        (
            b'{"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [-1]}}]}',
            "do not cover the prompt",
        ),
        (
            b'{"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [-1]}}], "usage": {"prompt_tokens": 2}}',
            "do not cover the prompt",
        ),
    ],
)
def test_a_server_without_prompt_logprobs_says_so(data: bytes, reason: str) -> None:
    found, _ = read_echo(data)
    assert isinstance(found, Failure) and reason in found.reason
