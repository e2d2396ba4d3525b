"""How often is a trained judge right about prompts with known answers, by verdicts and by notes?

    python -m benchmarks judge_accuracy --judge runs/world/judge --prompts runs/world/judge_rollouts/eval.jsonl

The prompts are those that `sip data judge-pairs` and `… rollout-pairs` write; each kind has a line (quality: a suffix
against its corrupted copy; rollouts: two rollouts of a policy; safety; factuality). `log_odds` reads the judge's
verdict; `notes` what it notes on the sentences of each text alone (for safety without the prefix, which those
prompts do not hold). Right is what is nearest to
the answer; 95 % intervals (Wilson). Pairs come in both orders, so that a judge that prefers a place is right half the
time.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.record import RESULTS, at_least, header, write_csv
from sip_engine.config.judge import LocalModelConfig
from sip_engine.data.prompts import prompt_records
from sip_engine.distributed.mesh import start_mesh
from sip_engine.evaluation.intervals import wilson
from sip_engine.judges.local import LocalJudge
from sip_engine.judges.prompts import verdicts_of
from sip_engine.llm.local_model import LocalModel
from sip_engine.policy.checkpoint import resolve_checkpoint
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.types import FactualityQuestion, PairQuestion, Question, SafetyQuestion, Score
from sip_engine.utils.errors import DataError, SipError
from sip_engine.utils.files import check_writable

METHODS = ("log_odds", "sentence_labels")
_FORMS = (
    (PairQuestion, re.compile(r"\x01(.*)\x02(.*)\x03(.*)\x04", re.DOTALL)),
    (SafetyQuestion, re.compile(r"\x05(.*)\x04", re.DOTALL)),
    (FactualityQuestion, re.compile(r"\x01(.*)\x06(.*)\x02(.*)\x04", re.DOTALL)),
)
Row = dict[str, object]


def question_of(prompt: str) -> Question:
    """The question that a compact prompt asks. Raises DataError."""
    for kind, form in _FORMS:
        if match := form.fullmatch(prompt):
            return kind(*match.groups())
    raise DataError(f"not a prompt that `sip data` writes for a judge: {prompt[:60]!r}")


def known_answers(path: Path) -> dict[str, list[tuple[Question, float]]]:
    """Kind of prompt -> its questions, each with the answer in [0, 1]. Raises DataError."""
    found: dict[str, list[tuple[Question, float]]] = {}
    for number, record in prompt_records(path):
        if "labels" in record:
            continue  # of a text, no question
        question = question_of(record["prompt"])
        answer = verdicts_of(question).get(record["answer"])
        if answer is None:
            raise DataError(f"{path}:{number}: {record['answer']!r} answers no such question")
        found.setdefault(str(record.get("kind")), []).append((question, answer))
    if not found:
        raise DataError(f"{path}: no prompts with an answer")
    return found


def _is_right(value: float, answer: float, options: Sequence[float]) -> bool:
    """Whether of all that could be answered the right one is nearest, and no other as near."""
    nearest = sorted(options, key=lambda option: abs(option - value))
    return nearest[0] == answer and abs(nearest[1] - value) > abs(answer - value)


def measure(model: LocalModel, known: Mapping[str, Sequence[tuple[Question, float]]]) -> Iterator[Row]:
    """One row for each kind of prompt and method."""
    judges = {
        method: LocalJudge(LocalModel(model.policy, model.cfg.model_copy(update={"method": method})))
        for method in METHODS
    }
    for kind, pairs in known.items():
        questions = [question for question, _ in pairs]
        options = sorted(set(verdicts_of(questions[0]).values()))
        for method in METHODS:
            start = time.perf_counter()
            found = judges[method].judge(questions)
            seconds = time.perf_counter() - start
            right = [
                _is_right(one.value, answer, options)
                for one, (_, answer) in zip(found, pairs, strict=True)
                if isinstance(one, Score)
            ]
            low, high = wilson(sum(right), len(right)) if right else (0.0, 1.0)
            yield {
                "kind": kind,
                "method": method,
                "asked": len(pairs),
                "answered": len(right),
                "accuracy": sum(right) / max(len(right), 1),
                "low": low,
                "high": high,
                "tokens": sum(one.cost.tokens for one in found),
                "seconds": seconds,
            }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the CSV file; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judge", type=Path, required=True, help="a checkpoint, or the folder of a run")
    parser.add_argument("--prompts", type=Path, required=True, help="an eval.jsonl of `sip data`")
    parser.add_argument("--max-prefix-chars", type=at_least(1), help="a longer prefix keeps its end")
    parser.add_argument("--out", type=Path, default=RESULTS / "judge_accuracy.csv", help="CSV file")
    args = parser.parse_args(argv)
    try:
        check_writable(args.out)
        known = known_answers(args.prompts)
        policy, _ = FrozenPolicy.load(resolve_checkpoint(args.judge), start_mesh())
        cfg = LocalModelConfig(
            checkpoint=args.judge, max_new_tokens=8, max_prefix_chars=args.max_prefix_chars
        )
        rows = list(measure(LocalModel(policy, cfg), known))
    except SipError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for row in rows:
        print(
            f"{row['kind']:12}{row['method']:10}{row['accuracy']:7.1%} ({row['low']:.1%} - {row['high']:.1%}) "
            f"of {row['answered']}/{row['asked']}, {row['tokens']} tokens, {row['seconds']:.1f} s"
        )
    about = header("judge_accuracy", ("torch",))
    write_csv(args.out, [{**about, **row} for row in rows])
    return 0
