"""How a judge fares on what it was not trained on: flaws, documents, lengths and injections of another kind.

Every question is a pair whose better half the world's truth knows, asked in both orders; a judge that prefers a place
is right half the time. Intervals are of pairs, 95 %.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sip_engine.config.judge import JudgeConfig
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus, open_corpus
from sip_engine.data.sources import open_world
from sip_engine.distributed.mesh import Mesh, start_alone
from sip_engine.evaluation.injection_texts import INJECTIONS
from sip_engine.evaluation.intervals import wilson
from sip_engine.experiments.reproduction.plan import SHIFTS, JudgeShifts
from sip_engine.judges.open import open_judge
from sip_engine.policy.checkpoint import checkpoint_tokenizer, resolve_checkpoint
from sip_engine.tasks.labels import cut_text
from sip_engine.types import Judge, PairQuestion, Sample, Score
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.files import write_json
from sip_engine.world import World, corrupt
from sip_engine.world.facts import rng_of
from sip_engine.world.measure import measure
from sip_engine.world.parse import SENTENCE

TRAINED = "as in training"
HARMLESS = " It was a day like any other."
"""The control beside injections: it asks for nothing."""
_TRIES = 16
_SPARE = 3
"""Held-out samples looked at for each pair wanted."""


@dataclass(frozen=True)
class Case:
    """Two continuations of a prefix of which the first is better."""

    prefix: str
    better: str
    worse: str


@dataclass(frozen=True)
class Shift:
    """A judge's accuracy on one kind of pairs."""

    group: str
    """corruptions, documents, lengths or injections; empty for what the judge was trained on."""
    name: str
    asked: int
    """Pairs."""
    answered: int
    """Of them, those of which both orders were answered."""
    accuracy: float | None
    low: float | None
    high: float | None


Spoil = Callable[[World, Sample, Sequence[Sample], random.Random], str]


def _disorder(world: World, sample: Sample, others: Sequence[Sample], rng: random.Random) -> str:
    sentences = SENTENCE.findall(sample.suffix)
    return "".join(rng.sample(sentences, len(sentences)))


def _one_myth(world: World, sample: Sample, others: Sequence[Sample], rng: random.Random) -> str:
    """As in training, but of one sentence only."""
    before = SENTENCE.findall(sample.suffix)
    for _ in range(_TRIES):  # the way is drawn
        spoilt, way = corrupt(world, sample.prefix, sample.suffix, rng.randrange(2**31))
        after = SENTENCE.findall(spoilt)
        if way == "myth" and len(before) == len(after):
            changed = [n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
            chosen = rng.choice(changed)
            return "".join(after[n] if n == chosen else text for n, text in enumerate(before))
    return ""


CORRUPTIONS: dict[str, Spoil] = {
    "another document's text": lambda world, sample, others, rng: rng.choice(others).suffix,
    "sentences in another order": _disorder,
    "each sentence twice": lambda world, sample, others, rng: "".join(
        text * 2 for text in SENTENCE.findall(sample.suffix)
    ),
    "a myth in one sentence only": _one_myth,
    "words left out": lambda world, sample, others, rng: " ".join(
        word for n, word in enumerate(sample.suffix.split(" ")) if n % 4 != 3
    ),
}


def measure_shifts(cfg: RunConfig, out: Path, spec: JudgeShifts) -> None:
    """Write `out`/shifts.json: a row a shift.

    Raises:
        SipError: bad settings or data, or no judge there, before anything is written.
    """
    if cfg.world is None:
        raise ConfigError(
            "judge_shifts: only the world knows which of two continuations is better: set [world]"
        )
    mesh = start_alone(seed=cfg.seed)
    local = {"checkpoint": str(spec.judge), "method": spec.method, "max_new_tokens": 8}
    asked = JudgeConfig.model_validate({"backend": "local", "local": local})
    corpus = _open(cfg, mesh, spec.pairs)
    judge = open_judge(cfg.model_copy(update={"judge": asked}), corpus, mesh)
    rows = [asdict(row) for row in shifts(cfg, mesh, corpus, judge, spec.pairs)]
    write_json(out / SHIFTS, {"judge": str(spec.judge), "method": spec.method, "rows": rows})


def shifts(cfg: RunConfig, mesh: Mesh, corpus: Corpus, judge: Judge, wanted: int) -> Iterator[Shift]:
    """Ask the judge about at most `wanted` pairs of every kind, those of its training first."""
    world = open_world(cfg)
    assert world is not None and cfg.world is not None
    trained = _trained_cases(world, corpus, wanted, cfg.seed)
    yield accuracy("", TRAINED, trained, judge, cfg.seed)
    for name, spoil in CORRUPTIONS.items():
        cases = _cases(world, corpus, spoil, wanted, (cfg.seed, name))
        yield accuracy("corruptions", name, cases, judge, cfg.seed)
    spec, data = cfg.world, cfg.data
    for name, over in (
        ("other people and facts", {"seed": spec.seed + 1}),
        ("more people, and other facts", {"seed": spec.seed + 2, "num_people": min(48, 2 * spec.num_people)}),
        ("two people a document", {"people_per_document": 2}),
    ):
        other = cfg.model_copy(update={"world": spec.model_copy(update=over)})
        there = open_world(other)
        assert there is not None
        cases = _trained_cases(there, _open(other, mesh, wanted), wanted, cfg.seed)
        yield accuracy("documents", name, cases, judge, cfg.seed)
    for name, over in (
        ("suffixes half as long", {"suffix_tokens": max(4, data.suffix_tokens // 2)}),
        ("suffixes twice as long", {"suffix_tokens": 2 * data.suffix_tokens}),
        (
            "prefixes half as long",
            {"max_prefix_tokens": max(data.min_prefix_tokens, data.max_prefix_tokens // 2)},
        ),
    ):
        other = cfg.model_copy(update={"data": data.model_copy(update=over)})
        cases = _trained_cases(world, _open(other, mesh, wanted), wanted, cfg.seed)
        yield accuracy("lengths", name, cases, judge, cfg.seed)
    harmless = [Case(case.prefix, case.better, case.worse + HARMLESS) for case in trained]
    yield accuracy("injections", "a harmless sentence behind the worse (control)", harmless, judge, cfg.seed)
    spoken = [
        Case(case.prefix, case.better, f"{case.worse} {INJECTIONS[n % len(INJECTIONS)].text}")
        for n, case in enumerate(trained)
    ]
    yield accuracy(
        "injections", f"{len(INJECTIONS)} injections in turn behind the worse", spoken, judge, cfg.seed
    )


def accuracy(group: str, name: str, cases: Sequence[Case], judge: Judge, seed: int) -> Shift:
    """How often the judge is right, a pair's two orders taken as one value; a tie is half right."""
    asked = [
        PairQuestion(c.prefix, *pair) for c in cases for pair in ((c.better, c.worse), (c.worse, c.better))
    ]
    answers = judge.judge(asked, seed=seed) if asked else []
    right = []
    for forth, back in zip(answers[::2], answers[1::2], strict=True):
        if isinstance(forth, Score) and isinstance(back, Score):
            right.append((_side(forth.value) + 1 - _side(back.value)) / 2)
    if not right:
        return Shift(group, name, len(cases), 0, None, None, None)
    # Halves vary less than yes and no do, so that the interval is wide rather than narrow.
    return Shift(
        group, name, len(cases), len(right), sum(right) / len(right), *wilson(sum(right), len(right))
    )


def _side(value: float) -> float:
    """1 for the first text, 0 for the second, a half for neither."""
    return 0.5 if value == 0.5 else float(value > 0.5)


def _trained_cases(world: World, corpus: Corpus, wanted: int, seed: int) -> list[Case]:
    def spoil(world: World, sample: Sample, others: Sequence[Sample], rng: random.Random) -> str:
        return corrupt(world, sample.prefix, sample.suffix, seed)[0]

    return _cases(world, corpus, spoil, wanted, (seed, TRAINED))


def _cases(world: World, corpus: Corpus, spoil: Spoil, wanted: int, key: tuple[int, str]) -> list[Case]:
    """Held-out suffixes against spoilt copies of at most their length that the truth calls worse."""
    rng, cases = rng_of("shifts", *key), []
    for number, sample in enumerate(corpus.held_out):
        if len(cases) == wanted:
            break
        others = [*corpus.held_out[:number], *corpus.held_out[number + 1 :]] or [sample]
        text = spoil(world, sample, others, rng)
        worse = cut_text(text, corpus.tokenizer, len(sample.suffix_ids)) if text else ""
        before, after = (measure(world, sample.prefix, t).quality for t in (sample.suffix, worse))
        if worse and after < before:
            cases.append(Case(sample.prefix, sample.suffix, worse))
    return cases


def _open(cfg: RunConfig, mesh: Mesh, wanted: int) -> Corpus:
    """The judge's held-out documents; few to train on, for nobody is trained."""
    assert cfg.world is not None
    world = cfg.world.model_copy(update={"split": "judge", "train_documents": 50})
    changes = {"world": world, "eval": cfg.eval.model_copy(update={"num_prefixes": _SPARE * wanted})}
    tokenizer = checkpoint_tokenizer(resolve_checkpoint(cfg.init)) if cfg.init else None
    return open_corpus(cfg.model_copy(update=changes), mesh, tokenizer)
