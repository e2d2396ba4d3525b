"""A judge's lessons and its exam: true suffixes of real documents against corrupted copies of them.

Lessons are corrupted by the rules of `tasks.corruptors.rules`. The exam has documents that no lesson came from, the
same way made, and three sets that lie outside: other ways to corrupt, another kind of text, and twice the length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sip_engine.config.judge import LocalModelConfig
from sip_engine.config.parse import merge_settings, parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import open_corpus
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.experiments.real.texts import gather_licences
from sip_engine.judges.local import LocalJudge
from sip_engine.llm.compact_prompts import compact_prompt
from sip_engine.llm.local_model import LocalModel
from sip_engine.policy.checkpoint import checkpoint_tokenizer, resolve_checkpoint
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.tasks.corruptors.base import Corruption, Corruptor
from sip_engine.tasks.corruptors.edits import EditCorruptor
from sip_engine.tasks.corruptors.rules import RuleCorruptor
from sip_engine.tasks.labels import cut_text
from sip_engine.types import Failure, PairQuestion, RewriteRequest, Sample, Score
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import read_json, write_json, write_jsonl

HELD_OUT, OTHER_WAYS, OTHER_TEXT, LONGER = "held_out", "other_ways", "other_text", "longer"
SETS = (HELD_OUT, OTHER_WAYS, OTHER_TEXT, LONGER)
LOG_ODDS, INFORMATION, REPLIES = "log_odds", "mutual_information", "replies"
_FEWEST = 8
"""Pairs below which a set says nothing and is left out."""
_BATCH_TOKENS = 4096

Exam = Mapping[str, Sequence["Pair"]]
Answers = dict[str, dict[str, np.ndarray]]
"""Way of asking -> set -> [pairs, 2] float64 right answers and all that could be had, of both orders."""


@dataclass(frozen=True)
class Pair:
    """A document's own suffix and a worse one of as many tokens."""

    prefix: str
    original: str
    worse: str
    flaw: str


def make_lessons(
    cfg: RunConfig, folder: Path, numbers: Mapping[str, int], max_tokens: int, mesh: Mesh
) -> None:
    """Write prompts in both orders: `numbers`[NAME] pairs to `folder`/NAME.jsonl, and held-out ones to eval.jsonl.

    cfg: which documents, and how they are cut. No pair is in two files. Prompts above `max_tokens` are left out.
    Nothing is done if the files are there.
    """
    if (folder / "eval.jsonl").is_file():
        return
    corpus = open_corpus(cfg, mesh, _tokenizer_of(cfg))
    wanted = sum(numbers.values())
    samples, at = corpus.stream.samples_at(0, min(wanted, corpus.num_samples)), 0
    for name, number in numbers.items():
        end = at + max(1, round(number / wanted * len(samples)))
        write_jsonl(
            folder / f"{name}.jsonl", _prompts(samples[at:end], corpus.tokenizer, max_tokens, cfg.seed)
        )
        at = end
    write_jsonl(folder / "eval.jsonl", _prompts(corpus.held_out, corpus.tokenizer, max_tokens, cfg.seed))


def _prompts(
    samples: Sequence[Sample], tokenizer: Tokenizer, max_tokens: int, seed: int
) -> list[dict[str, str]]:
    records = []
    for pair in corrupted(samples, RuleCorruptor(), tokenizer, seed=seed):
        for answer, first, second in (("1", pair.original, pair.worse), ("2", pair.worse, pair.original)):
            prompt = compact_prompt(PairQuestion(pair.prefix, first, second))
            if len(tokenizer.encode(prompt)) < max_tokens:
                kept = {"prompt": prompt, "answer": answer, "kind": "quality", "corruption": pair.flaw}
                records.append(kept)
    return [records[n] for n in np.random.default_rng(seed).permutation(len(records))]


def _tokenizer_of(cfg: RunConfig) -> Tokenizer:
    assert cfg.init is not None, "the judge goes on from the real model"
    return checkpoint_tokenizer(resolve_checkpoint(cfg.init))


def make_exam(cfg: RunConfig, folder: Path, num_pairs: int, mesh: Mesh) -> Exam:
    """The sets of the exam, kept in `folder`/exam.json. `cfg` is that of the lessons."""
    path = folder / "exam.json"
    if path.is_file():
        return _read_exam(path)
    data = cfg.data
    longer = {
        "suffix_tokens": 2 * data.suffix_tokens,
        "max_prefix_tokens": 2 * data.max_prefix_tokens,
        "min_prefix_tokens": 2 * data.min_prefix_tokens,
    }
    elsewhere = {"eval_path": gather_licences(folder / "licences.jsonl"), "holdout": 0.0}
    made: dict[str, tuple[dict[str, Any], Corruptor]] = {
        HELD_OUT: ({}, RuleCorruptor()),
        OTHER_WAYS: ({}, EditCorruptor()),
        OTHER_TEXT: (elsewhere, RuleCorruptor()),
        LONGER: (longer, RuleCorruptor()),
    }
    exam: dict[str, list[Pair]] = {}
    for name, (changes, corruptor) in made.items():
        try:
            samples, tokenizer = _held_out(cfg, changes, num_pairs, mesh)
        except DataError:  # no document that is long enough, or no licence here
            continue
        pairs = corrupted(samples, corruptor, tokenizer, seed=cfg.seed + 1)
        if len(pairs) >= _FEWEST:
            exam[name] = pairs
    write_json(path, {name: [asdict(pair) for pair in pairs] for name, pairs in exam.items()})
    return exam


def _held_out(
    cfg: RunConfig, changes: dict[str, Any], num: int, mesh: Mesh
) -> tuple[Sequence[Sample], Tokenizer]:
    over = {"data": changes, "eval": {"num_prefixes": num}}
    cfg = parse_config(merge_settings(cfg.model_dump(mode="json"), over), "the judge's exam")
    corpus = open_corpus(cfg, mesh, _tokenizer_of(cfg))
    return corpus.held_out, corpus.tokenizer


def corrupted(
    samples: Sequence[Sample], corruptor: Corruptor, tokenizer: Tokenizer, *, seed: int
) -> list[Pair]:
    """Each suffix beside a corrupted copy that is cut at its number of tokens, where one can be made."""
    copies = corruptor.corrupt([RewriteRequest(s.prefix, s.suffix) for s in samples], seed=seed)
    found = []
    for sample, copy in zip(samples, copies, strict=True):
        if isinstance(copy, Failure):
            continue
        cut = Corruption(cut_text(copy.text, tokenizer, len(sample.suffix_ids)), copy.flaw)
        if cut.text.strip() and cut.text.split() != sample.suffix.split():
            found.append(Pair(sample.prefix, sample.suffix, cut.text, cut.flaw))
    return found


def examine(checkpoint: Path, exam: Exam, mesh: Mesh, *, by_information: bool) -> Answers:
    """A judge's answers: by the odds of both verdicts on every set, by replies on documents like those it knows.

    by_information: ask the model by mutual information as well, which needs no training.
    """
    policy, _ = FrozenPolicy.load(resolve_checkpoint(checkpoint), mesh)
    policy.micro_batch_tokens = _BATCH_TOKENS  # memory of a laptop

    def judge(method: str) -> LocalJudge:
        settings = {"checkpoint": checkpoint, "method": method, "max_new_tokens": 8}
        return LocalJudge(LocalModel(policy, LocalModelConfig.model_validate(settings)))

    odds, replies = judge("log_odds"), judge("generate")
    found: Answers = {
        LOG_ODDS: {name: _right(odds, pairs) for name, pairs in exam.items()},
        REPLIES: {
            name: _all_asked(_right(replies, pairs)) for name, pairs in exam.items() if name == HELD_OUT
        },
    }
    if by_information:
        information = judge("mutual_information")
        found[INFORMATION] = {name: _right(information, pairs) for name, pairs in exam.items()}
    return found


def _right(judge: LocalJudge, pairs: Sequence[Pair]) -> np.ndarray:
    """[pairs, 2]: verdicts for the original of those given, of both orders."""
    there = [PairQuestion(pair.prefix, pair.original, pair.worse) for pair in pairs]
    back = [PairQuestion(pair.prefix, pair.worse, pair.original) for pair in pairs]
    answers = judge.judge([*there, *back])
    values = np.array([one.value if isinstance(one, Score) else np.nan for one in answers]).reshape(2, -1)
    right = (values[0] > 0.5).astype(np.float64) + (values[1] < 0.5)
    return np.stack([right, np.isfinite(values).sum(axis=0)], axis=1)


def _all_asked(rows: np.ndarray) -> np.ndarray:
    """The same where no verdict counts as a wrong one."""
    return np.stack([rows[:, 0], np.full(len(rows), 2.0)], axis=1)


def save_answers(path: Path, answers: Answers) -> None:
    """Write an examination, whole or not at all."""
    write_json(
        path, {way: {name: rows.tolist() for name, rows in sets.items()} for way, sets in answers.items()}
    )


def read_answers(path: Path) -> Answers:
    """What `save_answers` wrote. Raises DataError."""
    try:
        return {
            way: {name: np.array(rows, np.float64).reshape(-1, 2) for name, rows in sets.items()}
            for way, sets in read_json(path).items()
        }
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not what `sip real` writes ({error}); remove it to measure anew") from None


def _read_exam(path: Path) -> Exam:
    try:
        return {name: [Pair(**pair) for pair in pairs] for name, pairs in read_json(path).items()}
    except (TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not what `sip real` writes ({error}); remove the folder of the judge"
        ) from None
