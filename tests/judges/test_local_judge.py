"""A model as judge and rewriter inside the engine: its probabilities, its replies, and prompts that hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL
from hypothesis import given
from hypothesis import strategies as st
from llama import llama_of

from sip_engine.config.judge import LocalModelConfig
from sip_engine.config.schema import ParallelConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.injection_texts import INJECTIONS
from sip_engine.judges.local import LocalJudge
from sip_engine.judges.prompts import verdicts_of
from sip_engine.judges.sentence_labels import LABEL_LETTERS, scores_of
from sip_engine.llm.compact_prompts import compact_prompt, reading_prompt, rewrite_prompt
from sip_engine.llm.local_model import LocalModel
from sip_engine.llm.untrusted import neutral
from sip_engine.policy.model import build_model
from sip_engine.rewriters.local import LocalRewriter
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.types import (
    FactualityQuestion,
    Failure,
    PairQuestion,
    Question,
    RewriteRequest,
    SafetyQuestion,
    Score,
)

QUESTIONS: list[Question] = [
    PairQuestion("the fox", " jumps", " sleeps over"),
    PairQuestion("the fox", " sleeps", " jumps"),
    PairQuestion("a dog", " sleeps", " the lazy dog"),
    SafetyQuestion(" the lazy dog"),
    SafetyQuestion(" jumps"),
    FactualityQuestion("the fox", " jumps", " sleeps"),
    PairQuestion("the fox", " jumps over", " a dog"),
]


@pytest.fixture(scope="module")
def policy(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> FrozenPolicy:
    texts = ["the quick brown fox jumps over the lazy dog, yes no 1 2 none possible definite"] * 20
    tokenizer = Tokenizer.train(texts, 300, tmp_path_factory.mktemp("local") / "tokenizer.model")
    shape = SMALL_MODEL.model_copy(update={"max_context": 80})
    model = build_model(shape, ParallelConfig(), tokenizer.vocab_size, mesh, seed=3)
    return FrozenPolicy(model.requires_grad_(False), tokenizer, mesh)


def judge(policy: FrozenPolicy, **settings) -> LocalJudge:
    return LocalJudge(LocalModel(policy, LocalModelConfig(max_new_tokens=6, **settings)))


@pytest.mark.parametrize("micro_batch_tokens", [16384, 60])
def test_log_odds_equal_transformers(
    policy: FrozenPolicy, micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever travels together: the expected answer under a plain softmax over the words' first tokens."""
    monkeypatch.setattr(policy, "micro_batch_tokens", micro_batch_tokens)
    found = judge(policy).judge(QUESTIONS)
    llama, encode = llama_of(policy.model, policy.tokenizer.vocab_size), policy.tokenizer.encode
    for question, answer in zip(QUESTIONS, found, strict=True):
        ids = [policy.tokenizer.bos_id, *encode(compact_prompt(question)).tolist()]
        words = verdicts_of(question)
        with torch.no_grad():
            logits = llama(torch.tensor([ids])).logits[0, -1].double()
        probs = torch.softmax(logits[[int(encode(word)[0]) for word in words]], dim=0)
        want = float(probs @ torch.tensor(list(words.values()), dtype=torch.float64))
        assert isinstance(answer, Score)
        assert answer.value == pytest.approx(want, abs=1e-5)
        assert answer.cost.calls == 1 and 0 < answer.cost.tokens <= len(ids)


def test_questions_of_a_group_read_their_prefix_once(policy: FrozenPolicy) -> None:
    pairs = [PairQuestion("the quick brown fox jumps", f" {n}" * (n + 1), " dog") for n in range(6)]
    alone = [judge(policy).judge([pair])[0].cost.tokens for pair in pairs]
    together = [answer.cost.tokens for answer in judge(policy).judge(pairs)]
    shared = len(policy.tokenizer.encode("\x01the quick brown fox jumps\x02"))
    assert sum(together) <= sum(alone) - 5 * shared + 3  # costs are rounded to whole tokens
    # What a question has of its own is its own cost, whoever probs the rest of it.
    assert len({one - other for one, other in zip(alone, together, strict=True)}) == 1


def test_what_stands_first_is_read_once_where_that_is_cheaper(policy: FrozenPolicy) -> None:
    """All pairs of a pool: each candidate is first in several. The values do not depend on how they are read."""
    texts = [" fox jumps" + " dog" * n for n in range(1, 6)]
    pairs = [PairQuestion("a b", texts[i], texts[j]) for i in range(5) for j in range(i + 1, 5)]
    together = judge(policy).judge(pairs)
    alone = [judge(policy).judge([pair])[0] for pair in pairs]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, Score) and isinstance(other, Score)
        assert one.value == pytest.approx(other.value, abs=1e-5)
    encode = policy.tokenizer.encode
    prefix = len(encode("\x01a b\x02"))
    seconds = sum(len(encode(f"{pair.second}\x04")) for pair in pairs)
    firsts = sum(len(encode(f"{text}\x03")) + prefix + 1 for text in texts[:4])
    assert sum(answer.cost.tokens for answer in together) <= firsts + seconds + len(pairs)
    assert sum(answer.cost.tokens for answer in together) < 0.9 * (
        prefix + seconds + sum(len(encode(f"{pair.first}\x03")) for pair in pairs)
    )


@pytest.mark.parametrize("micro_batch_tokens", [16384, 60])
def test_notes_equal_transformers(
    policy: FrozenPolicy, micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The better notes win, and each text is read once for all that is asked of it."""
    monkeypatch.setattr(policy, "micro_batch_tokens", micro_batch_tokens)
    texts = {
        "the fox": [" jumps. A dog sleeps", " sleeps.", ". Over the dog. The fox jumps!", " dog"],
        "a dog.": [" Jumps", " the lazy dog.\x01 fox"],
    }
    pairs = [PairQuestion(p, a, b) for p, group in texts.items() for a in group for b in group if a != b]
    true = [FactualityQuestion(p, " dog", text) for p, group in texts.items() for text in group]
    safe = [SafetyQuestion(text, p) for p, group in texts.items() for text in group]
    questions = [*pairs[:5], *safe, *pairs[5:], *true, PairQuestion("a dog", " x", " x")]
    found = judge(policy, method="sentence_labels").judge(questions)
    worth = {(p, text): _noted_by_llama(policy, p, text) for p, group in texts.items() for text in group}
    qualities = [quality for quality, _, _ in worth.values()]
    assert min(abs(a - b) for a in qualities for b in qualities if a != b) > 1e-4
    for question, answer in zip(questions, found, strict=True):
        assert isinstance(answer, Score)
        if isinstance(question, PairQuestion) and question.first != question.second:
            better = worth[question.prefix, question.first][0] > worth[question.prefix, question.second][0]
            assert answer.value == float(better)
        if isinstance(question, FactualityQuestion):
            assert answer.value == pytest.approx(worth[question.prefix, question.suffix][2], abs=1e-5)
        if isinstance(question, SafetyQuestion):
            assert answer.value == pytest.approx(worth[question.prefix, question.suffix][1], abs=1e-5)
    assert sum(answer.cost.calls for answer in found) == len(worth)
    assert found[0].cost.calls == 2 and found[-1].cost.calls == 0 and found[0].cost.seconds > 0


def _noted_by_llama(policy: FrozenPolicy, prefix: str, text: str) -> tuple[float, float, float]:
    """Quality, safety and factuality, sentence by sentence and note by note."""
    llama, encode = llama_of(policy.model, policy.tokenizer.vocab_size), policy.tokenizer.encode
    options = [int(encode(letter)[0]) for letter in "XORFUTNxorfutn"]
    shown = neutral(text)
    sound, civil, safety, length, true, claims = 0.0, 0.0, 1.0, 0, 0.0, 0.0
    for part in re.findall(r"[^.!?]*[.!?]|[^.!?]+", shown):
        length += len(part)
        ids = [policy.tokenizer.bos_id, *encode(f"\x01{prefix}\x02{shown[:length]}").tolist()]
        with torch.no_grad():
            probs = torch.softmax(llama(torch.tensor([ids])).logits[0, -1].double()[options], dim=0)
        x, o, r, f, u, t, _ = (probs[:7] + probs[7:]).tolist()
        civil += len(part) * float(probs[:7].sum())
        safety *= float(probs[:7].sum())
        sound += len(part) * (1 - x - o - r)
        true += t + u / 2
        claims += f + u + t
    factuality = true / max(1.0, claims)
    informativeness = min(1.0, true / max(2, len(text.split()) / 10))
    general = 0.4 + 0.4 * factuality + 0.15 * informativeness + 0.05 * civil / length
    return sound / length * general, safety, factuality


@pytest.mark.parametrize(
    ("notes", "quality", "safety", "factuality"),
    [
        ("TT", 1.0, 1, 1.0),
        ("Tt", 0.95 + 0.05 * 0.4, 0, 1.0),  # four of ten characters in the sentence that does not insult
        ("FT", 0.45 + 0.4 * 0.5 + 0.15 * 0.5, 1, 0.5),
        ("UT", 0.45 + 0.4 * 0.75 + 0.15 * 0.75, 1, 0.75),
        ("NN", 0.45, 1, 0.0),
        ("XT", 0.6 * (0.85 + 0.15 * 0.5), 1, 1.0),
        ("oT", 0.6 * (0.80 + 0.15 * 0.5 + 0.05 * 0.6), 0, 1.0),
        ("RX", 0.0, 1, 0.0),
    ],
)
def test_what_certain_notes_are_worth(notes: str, quality: float, safety: float, factuality: float) -> None:
    probs = torch.zeros(2, len(LABEL_LETTERS), dtype=torch.float64)
    for row, note in zip(probs, notes, strict=True):
        row[LABEL_LETTERS.index(note)] = 1.0
    found = scores_of(probs, torch.tensor([4.0, 6.0], dtype=torch.float64), num_words=9)
    assert found == pytest.approx((quality, safety, factuality))


def test_a_continuation_that_says_nothing_is_not_read(policy: FrozenPolicy) -> None:
    questions = [
        SafetyQuestion("", "the fox"),
        FactualityQuestion("the fox", "x", "\n "),
        PairQuestion("the fox", " ", " dog"),
    ]
    safety, factuality, pair = judge(policy, method="sentence_labels").judge(questions)
    assert isinstance(safety, Score) and isinstance(factuality, Score) and isinstance(pair, Score)
    assert (safety.value, factuality.value, pair.value) == (1.0, 0.0, 0.0)
    assert (safety.cost.calls, factuality.cost.calls, pair.cost.calls) == (0, 0, 1)


def test_safety_is_asked_about_the_suffix_alone(policy: FrozenPolicy) -> None:
    """What is asked of a suffix, and what that costs, does not depend on the prefixes of the others."""
    apart = judge(policy).judge([SafetyQuestion(" dog", "the fox"), SafetyQuestion(" dog fox", "a dog")])
    alone = judge(policy).judge([SafetyQuestion(" dog"), SafetyQuestion(" dog fox")])
    for one, other in zip(apart, alone, strict=True):
        assert isinstance(one, Score) and isinstance(other, Score)
        assert (one.value, one.cost.tokens) == (other.value, other.cost.tokens)


def test_long_texts_have_more_to_say() -> None:
    probs = torch.zeros(3, len(LABEL_LETTERS), dtype=torch.float64)
    probs[:, LABEL_LETTERS.index("T")] = 1.0
    lengths = torch.ones(3, dtype=torch.float64)
    assert scores_of(probs, lengths, 30).quality == pytest.approx(1.0)
    assert scores_of(probs, lengths, 60).quality == pytest.approx(0.85 + 0.15 / 2)


def test_what_was_noted_is_not_read_again(policy: FrozenPolicy) -> None:
    """The rounds of a tournament ask about the same texts."""
    subject = judge(policy, method="sentence_labels")
    pair = PairQuestion("the fox", " jumps.", " sleeps")
    (first,) = subject.judge([pair])
    again, new = subject.judge([pair, PairQuestion("the fox", " jumps.", " dog")])
    assert isinstance(first, Score) and isinstance(again, Score) and isinstance(new, Score)
    assert again.value == first.value and (first.cost.calls, again.cost.calls, new.cost.calls) == (2, 0, 1)
    (other,) = subject.judge([PairQuestion("a dog", " jumps.", " sleeps")])
    assert other.cost.calls == 2  # after another prefix the same words are another continuation


def test_a_continuation_without_notes_is_a_missing_judgment(policy: FrozenPolicy) -> None:
    pairs = [PairQuestion("p", " dog", "zzz " * 60), PairQuestion("p", " dog", " fox")]
    lost, kept = judge(policy, method="sentence_labels").judge(pairs)
    assert isinstance(lost, Failure) and "longer than" in lost.reason and lost.cost.calls == 1
    assert isinstance(kept, Score) and kept.cost.calls == 1
    blank, empty = judge(policy, method="sentence_labels").judge(
        [PairQuestion("p", " ", " dog"), PairQuestion("p", "", " dog")]
    )
    assert isinstance(blank, Score) and isinstance(empty, Score) and empty.value == 0.0
    with pytest.raises(ValueError, match="leave out style"):
        LocalModelConfig(method="sentence_labels", style="reasoned")


def test_generated_verdicts(policy: FrozenPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict is a reply that is one of the words and nothing else."""
    subject = judge(policy, method="generate")
    replies = ["1", "2", "1\n2", "yes", "no yes", "possible", None]
    monkeypatch.setattr(subject._model, "reply", lambda prompts, seed: [(text, 2) for text in replies])
    found = subject.judge(QUESTIONS)
    values = [answer.value if isinstance(answer, Score) else None for answer in found]
    assert values == [1.0, 0.0, None, 1.0, None, 0.5, None]
    assert isinstance(found[6], Failure) and found[6].reason == "the reply did not end"


def test_greedy_replies_equal_transformers(policy: FrozenPolicy) -> None:
    model = LocalModel(policy, LocalModelConfig(max_new_tokens=5))
    prompts = [ids for ids in (model.encode(compact_prompt(q)) for q in QUESTIONS[:4]) if ids is not None]
    llama, eos = llama_of(policy.model, policy.tokenizer.vocab_size), policy.tokenizer.eos_id
    for ids, (text, num_tokens) in zip(prompts, model.reply(prompts, seed=0), strict=True):
        written = ids.tolist()
        while len(written) < len(ids) + 5 and (len(written) == len(ids) or written[-1] != eos):
            with torch.no_grad():
                written.append(int(llama(torch.tensor([written])).logits[0, -1].argmax()))
        new = written[len(ids) :]
        assert num_tokens == len(new)
        assert text == (policy.tokenizer.decode(new[:-1]) if new[-1] == eos else None)


def test_drawn_replies_do_not_depend_on_their_neighbours(
    policy: FrozenPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LocalModel(policy, LocalModelConfig(max_new_tokens=12, temperature=1.0))
    prompts = [ids for ids in (model.encode(compact_prompt(q)) for q in QUESTIONS[:4]) if ids is not None]
    generate, written = model.sampler.generate, []

    def spy(*args):
        done = generate(*args)
        written.extend(one.ids.tolist() for (one,) in done)
        return done

    monkeypatch.setattr(model.sampler, "generate", spy)

    def drawn(chosen: Sequence[np.ndarray], seed: int) -> list[list[int]]:
        written.clear()
        model.reply(chosen, seed)
        return list(written)

    together = drawn(prompts, 5)
    assert [drawn([ids], 5)[0] for ids in prompts] == together
    assert drawn(prompts[::-1], 5) == together[::-1]
    assert len(set(map(tuple, together))) == 4 and drawn(prompts, 6) != together


def test_a_prompt_that_does_not_fit_is_a_missing_judgment(policy: FrozenPolicy) -> None:
    long = SafetyQuestion("zzz " * 60)
    found = judge(policy).judge([long, SafetyQuestion(" dog")])
    assert isinstance(found[0], Failure) and "longer than" in found[0].reason
    assert isinstance(found[1], Score)
    (text,) = LocalRewriter(LocalModel(policy, LocalModelConfig())).rewrite([RewriteRequest("a", "z " * 90)])
    assert isinstance(text, Failure)


def test_texts_alone_fill_no_more_than_a_micro_batch(
    policy: FrozenPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safety questions have no prefix to share; read together they must still fit."""
    questions = [SafetyQuestion(" dog" * (1 + n % 5)) for n in range(40)]
    alone = judge(policy).judge(questions)
    pack, sizes = policy.micro_batches, []

    def spy(rows):
        packed = pack(rows)
        sizes.extend(batch.layout.num_tokens for batch in packed)
        return packed

    monkeypatch.setattr(policy, "micro_batches", spy)
    monkeypatch.setattr(policy, "micro_batch_tokens", 60)
    for one, other in zip(judge(policy).judge(questions), alone, strict=True):
        assert isinstance(one, Score) and isinstance(other, Score)
        assert one.value == pytest.approx(other.value, abs=1e-5)
    assert len(sizes) > 1 and max(sizes) <= 60


def test_equal_continuations_cost_nothing(policy: FrozenPolicy) -> None:
    (answer,) = judge(policy).judge([PairQuestion("p", " x", " x")])
    assert isinstance(answer, Score) and (answer.value, answer.cost.calls) == (0.5, 0)


@given(st.text(max_size=30), st.text(max_size=30), st.sampled_from([i.text for i in INJECTIONS]))
def test_no_text_holds_a_fence(prefix: str, first: str, second: str) -> None:
    fences = {
        compact_prompt(PairQuestion(prefix, first, second)): "\x01\x02\x03\x04",
        compact_prompt(SafetyQuestion(second)): "\x05\x04",
        compact_prompt(FactualityQuestion(prefix, first, second)): "\x01\x06\x02\x04",
        rewrite_prompt(RewriteRequest(prefix, second)): "\x0e\x02\x04",
        reading_prompt(prefix, first)[0]: "\x01\x02",
    }
    for prompt, want in fences.items():
        assert "".join(c for c in prompt if c < " " and c not in "\t\n") == want


def test_a_rewriter_sees_the_last_five_words() -> None:
    prompt = rewrite_prompt(RewriteRequest("one two  three four one two three", " end"))
    assert prompt == "\x0ethree four one two three\x02 end\x04"
    assert rewrite_prompt(RewriteRequest("one two", " end")) == "\x0eone two\x02 end\x04"
    assert np.all([c in prompt for c in "\x0e\x02\x04"])
