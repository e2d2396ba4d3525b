"""What does mutual information prefer, and what is it blind to? One model, its own verdicts and likelihood beside it.

    python -m benchmarks mutual_information --judge runs/smollm2 --pools 66

Real text (Python's language reference, which every Python brings along) is cut into prefix and suffix. Each suffix
is held against a rival that a good judge likes less; `cut off` alone has no right answer: a suffix against its own
first half, of which a fair judge prefers neither. Three rivals are made by copying: the end of the prefix, the same
with a word in six changed, and the suffix with the end of the prefix for its second half. Columns: how often the true
suffix wins, with its 95 % interval (Wilson), and the seconds that the method took for all kinds together.

- mutual_information: `judge.local.method`, with tokens in runs of four that stand in the prefix earning nothing
  (`judge.local.copied_run`), with runs of eight and twelve, and with none;
- likelihood: mean log p(token | prefix) alone;
- verdicts: the model asked in words (log-odds, `judge.local.style` "direct" or "chat"), the mean of both orders.

Factuality has the original as reference: the suffix' sentences in another order against the same with facts changed
(numbers, negations, names), so that neither side can be told by copying alone.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from benchmarks.record import RESULTS, at_least, header, write_csv
from sip_engine.config.judge import LocalModelConfig
from sip_engine.distributed.mesh import start_mesh
from sip_engine.evaluation.intervals import wilson
from sip_engine.judges.local import LocalJudge
from sip_engine.judges.mutual_information import LocalReader, Reading, TokenLogProbs, mean_gain
from sip_engine.llm.local_model import LocalModel
from sip_engine.policy.checkpoint import resolve_checkpoint
from sip_engine.sampler.frozen import FrozenPolicy, encode_prompt
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.types import FactualityQuestion, PairQuestion, Score
from sip_engine.utils.copied import RUN
from sip_engine.utils.errors import SipError
from sip_engine.utils.files import check_writable

FACTS = "factuality, told in another order"
MUTUAL, LIKELIHOOD = "mutual_information", "likelihood"
GUARDS = {MUTUAL: RUN, f"{MUTUAL}, runs of 8": 8, f"{MUTUAL}, runs of 12": 12, f"{MUTUAL}, unguarded": 0}
"""How many tokens in a row are a copy, by method."""
Cut = tuple[str, str]
"""A prefix and its own suffix."""
Case = tuple[str, str, str]
"""A prefix, the text that should win, its rival."""
Row = dict[str, object]
_SENTENCE = re.compile(r"[^.!?]*[.!?]+\s*|[^.!?]+$")
_TURNED = {
    "is": "is not", "are": "are not", "can": "cannot", "must": "must not", "may": "may not", "not": "always",
    "True": "False", "False": "True", "first": "last", "last": "first", "before": "after", "after": "before",
    "left": "right", "right": "left", "all": "no", "any": "no", "same": "opposite",
}  # fmt: skip


def cuts_of(
    model: LocalModel, num: int, prefix_tokens: int, suffix_tokens: int, rng: random.Random
) -> list[Cut]:
    """Prefix and suffix of `num` places in the language reference, at most two of a topic."""
    tokenizer, found = model.tokenizer, []
    for name in sorted(topics):
        ids = tokenizer.encode(topics[name])
        room = len(ids) - prefix_tokens - suffix_tokens
        for start in sorted(rng.sample(range(room), 2)) if room > suffix_tokens else ():
            at = start + prefix_tokens
            prefix = tokenizer.decode(ids[start:at])
            found.append((prefix, tokenizer.decode(ids[at : at + suffix_tokens])))
    return rng.sample(found, min(num, len(found)))


def shuffled(text: str, rng: random.Random) -> str:
    """The words of a text in another order."""
    words = text.split()
    return " " + " ".join(rng.sample(words, len(words)))


def repeated(text: str) -> str:
    """The first words of a text again and again, as long as it."""
    phrase = " " + " ".join(text.split()[:6])
    return (phrase * (1 + len(text) // max(len(phrase), 1)))[: len(text)]


def wrong(text: str, names: Sequence[str], rng: random.Random) -> str:
    """A text with numbers, negations and quoted names changed; the same where it has none."""

    def change(match: re.Match[str]) -> str:
        word = match[0]
        if word.isdigit():
            return str(int(word) + rng.randint(1, 8))
        if word in _TURNED:
            return _TURNED[word]
        others = [name for name in names if name != word]
        return rng.choice(others) if word in names and others else word

    return re.sub(r"\w+", change, text)


def copied_badly(prefix: str, suffix: str, other: str, rng: random.Random) -> str:
    """The end of the prefix, as many words as the suffix has, each sixth another one."""
    words, strange = prefix.split()[-len(suffix.split()) :], other.split()
    return " " + " ".join(rng.choice(strange) if n % 6 == 5 else word for n, word in enumerate(words))


def turned_round(text: str) -> str:
    """The sentences of a text, the last one first."""
    sentences = _SENTENCE.findall(text)
    return " " + " ".join(sentence.strip() for sentence in reversed(sentences))


def written_from_nothing(model: LocalModel, num: int, tokens: int) -> list[str]:
    """Fluent text about nothing here: what the model writes behind one word."""
    params = SamplingParams(tokens, top_p=0.9, seed=7)
    start = encode_prompt(model.tokenizer, "The")
    done = model.sampler.generate([Request(start, 1, document=n) for n in range(num)], params)
    return [f" The{model.tokenizer.decode(one.ids)}" for (one,) in done]


def cases_of(
    model: LocalModel, cuts: Sequence[Cut], tokens: int, rng: random.Random
) -> dict[str, list[Case]]:
    """Kind of rival -> prefix, suffix and rival of every cut that has one."""
    nonsense = written_from_nothing(model, len(cuts), tokens)
    found: dict[str, list[Case]] = {}
    for number, (prefix, suffix) in enumerate(cuts):
        other = cuts[(number + 1) % len(cuts)][1]
        names = sorted(set(re.findall(r'"(\w{3,})\(?\)?"', prefix + suffix)))
        rivals = {
            "another passage": other,
            "shuffled words": shuffled(suffix, rng),
            "a phrase repeated": repeated(suffix),
            "end of the prefix copied": prefix[-len(suffix) :],
            "copied, a word in six changed": copied_badly(prefix, suffix, other, rng),
            "second half copied": suffix[: len(suffix) // 2] + prefix[-(len(suffix) - len(suffix) // 2) :],
            "fluent nonsense": nonsense[number],
            "wrong facts": wrong(suffix, names, rng),
            "cut off": suffix[: len(suffix) // 2],
        }
        for kind, rival in rivals.items():
            if rival.split() != suffix.split() and rival.strip():
                found.setdefault(kind, []).append((prefix, suffix, rival))
    return found


def read_wins(model: LocalModel, cases: Sequence[Case]) -> dict[str, list[float]]:
    """1 where the first text is preferred, by mutual information and by mean log-prob; each text is read once."""
    texts = dict.fromkeys((prefix, text) for prefix, *both in cases for text in both)
    readings = [
        reading for prefix, text in texts for reading in (Reading("", "", text), Reading("", prefix, text))
    ]
    found = LocalReader(model).read(readings)
    values: dict[str, dict[tuple[str, str], float]] = {name: {} for name in (*GUARDS, LIKELIHOOD)}
    for key, alone, after in zip(texts, found[::2], found[1::2], strict=True):
        assert isinstance(after, TokenLogProbs), "the texts are short"
        values[LIKELIHOOD][key] = float(np.nanmean(after.logprobs))
        for name, run in GUARDS.items():
            gain = mean_gain(alone, alone, after, run)
            assert isinstance(gain, float), "the texts are short"
            values[name][key] = gain
    return {
        name: [float(of[prefix, text] > of[prefix, rival]) for prefix, text, rival in cases]
        for name, of in values.items()
    }


def verdict_wins(model: LocalModel, cases: Sequence[Case], style: str) -> list[float]:
    """The judge's comparisons in words, the mean of both orders."""
    there = [PairQuestion(*case) for case in cases]
    back = [PairQuestion(prefix, rival, text) for prefix, text, rival in cases]
    values = _values(_judge(model, "log_odds", style).judge([*there, *back]))
    pairs = zip(values[: len(cases)], values[len(cases) :], strict=True)
    return [(one + 1.0 - other) / 2 for one, other in pairs]


def factuality(
    model: LocalModel, cases: Sequence[tuple[str, str, str, str]], method: str, style: str = "compact"
) -> list[float]:
    """1 where the text is called truer than its rival, given the original: (prefix, original, text, rival)."""
    asked = [FactualityQuestion(p, original, text) for p, original, *texts in cases for text in texts]
    values = _values(_judge(model, method, style).judge(asked))
    return [float(one > other) for one, other in zip(values[::2], values[1::2], strict=True)]


def _judge(model: LocalModel, method: str, style: str) -> LocalJudge:
    changes = {"method": method, "style": style}
    return LocalJudge(LocalModel(model.policy, model.cfg.model_copy(update=changes)))


def _values(answers: Sequence[object]) -> list[float]:
    return [one.value if isinstance(one, Score) else float("nan") for one in answers]


def _row(kind: str, method: str, wins: Sequence[float], seconds: float) -> Row:
    known = [value for value in wins if value == value]
    right = sum(value > 0.5 for value in known)
    low, high = wilson(right, len(known)) if known else (0.0, 1.0)
    share = right / max(len(known), 1)
    return {
        "kind": kind, "method": method, "asked": len(wins), "answered": len(known), "preferred": share,
        "low": low, "high": high, "seconds": seconds,
    }  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What to measure."""

    methods: Sequence[str]
    """`mutual_information`, with all that its readings tell, and styles of verdicts."""
    kinds: Sequence[str]
    """Of rivals; none: all."""
    asked: int

    def has(self, kind: str) -> bool:
        return not self.kinds or any(kind.startswith(name) for name in self.kinds)


def measure(model: LocalModel, cuts: Sequence[Cut], tokens: int, wanted: Wanted, seed: int) -> Iterator[Row]:
    """A row for each kind of rival and method; verdicts, which read most, on the first `wanted.asked` cuts."""
    rng = random.Random(seed)
    by_kind = cases_of(model, cuts, tokens, rng)
    told = told_again(cuts, rng)
    asked = {prefix for prefix, _ in cuts[: wanted.asked]}
    every = [(kind, case) for kind, cases in by_kind.items() for case in cases if wanted.has(kind)]
    some = [(kind, case) for kind, case in every if case[0] in asked]
    if MUTUAL in wanted.methods:
        start = time.perf_counter()
        found = read_wins(model, [case for _, case in every])
        for method, wins in found.items():
            yield from _rows(method, every, wins, time.perf_counter() - start)
        if wanted.has(FACTS):
            start = time.perf_counter()
            wins = factuality(model, told, MUTUAL)
            yield _row(FACTS, MUTUAL, wins, time.perf_counter() - start)
    for style in wanted.methods:
        if style == MUTUAL:
            continue
        start = time.perf_counter()
        wins = verdict_wins(model, [case for _, case in some], style)
        yield from _rows(f"verdicts, {style}", some, wins, time.perf_counter() - start)
        if wanted.has(FACTS):
            start = time.perf_counter()
            wins = factuality(model, [one for one in told if one[0] in asked], "log_odds", style)
            yield _row(FACTS, f"verdicts, {style}", wins, time.perf_counter() - start)


def _rows(
    method: str, cases: Sequence[tuple[str, Case]], wins: Sequence[float], seconds: float
) -> Iterator[Row]:
    """A row for each kind of rival."""
    for kind in dict.fromkeys(kind for kind, _ in cases):
        mine = [win for (other, _), win in zip(cases, wins, strict=True) if other == kind]
        yield _row(kind, method, mine, seconds)


def told_again(cuts: Sequence[Cut], rng: random.Random) -> list[tuple[str, str, str, str]]:
    """(prefix, original, its sentences in another order, the same with facts changed), where there are facts."""
    told = []
    for prefix, suffix in cuts:
        names = sorted(set(re.findall(r'"(\w{3,})\(?\)?"', prefix + suffix)))
        again = turned_round(suffix)
        changed = wrong(again, names, rng)
        if changed != again:
            told.append((prefix, suffix, again, changed))
    return told


def _others(path: Path, rows: Sequence[Row]) -> list[Row]:
    """What earlier runs wrote of other kinds and methods."""
    mine = {(row["kind"], row["method"]) for row in rows}
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file) if (row["kind"], row["method"]) not in mine]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the CSV file; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judge", type=Path, required=True, help="a checkpoint, or the folder of a run")
    parser.add_argument("--pools", type=at_least(2), default=66, help="places in the text")
    parser.add_argument("--asked", type=at_least(1), default=12, help="of these, places judged by verdicts")
    parser.add_argument("--prefix-tokens", type=at_least(1), default=192)
    parser.add_argument("--suffix-tokens", type=at_least(8), default=64)
    parser.add_argument(
        "--methods", default=f"{MUTUAL},direct,chat", help="with commas; direct, chat: styles of verdicts"
    )
    parser.add_argument(
        "--kinds", default="", help="of rivals, or how they begin, with semicolons; default: all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "mutual_information.csv", help="CSV file")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    wanted = Wanted(args.methods.split(","), [k for k in args.kinds.split(";") if k], args.asked)
    about = header("mutual_information", ("torch",))
    try:
        check_writable(args.out)
        policy, _ = FrozenPolicy.load(resolve_checkpoint(args.judge), start_mesh())
        policy.micro_batch_tokens = 4096  # memory of a laptop
        model = LocalModel(policy, LocalModelConfig(checkpoint=args.judge))
        cuts = cuts_of(model, args.pools, args.prefix_tokens, args.suffix_tokens, random.Random(args.seed))
        for row in measure(model, cuts, args.suffix_tokens, wanted, args.seed):
            print(
                f"{row['kind']:36}{row['method']:20}{row['preferred']:7.1%} ({row['low']:.1%} - {row['high']:.1%}) "
                f"of {row['answered']}/{row['asked']}, {row['seconds']:.1f} s",
                flush=True,
            )
            rows.append({**about, **row})
            write_csv(args.out, [*_others(args.out, rows), *rows])  # verdicts take long
    except SipError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
