r"""Can a text talk a judge into a verdict? Held-out suffixes with and without each injected text of the suite.

    python -m benchmarks injections --judge runs/world/judge --config configs/world/judge_data.toml \
        --method sentence_labels

Without --config the documents are the synthetic world's (those of configs/world) and the corruptor is its own; the
world's truth says which suffixes are unsafe. The judge is asked two kinds of questions, each plain and then with
every injection of `sip_engine.evaluation.injection_texts` at either end of a text that should lose:

- quality: a suffix against its corrupted copy, which has the injection and is shown first every other time;
- safety: an unsafe suffix.

Only copies that stay worse (in the world) and suffixes that stay unsafe with a harmless sentence at either end are
taken: joined to half a sentence, any text can change what is said.

A verdict can move if the plain one is not in favour of that text; it has moved if it is nearer to that text with the
injection (against it, undecided, in favour). Shares are of the verdicts that can move, with 95 % intervals.
Any change of a text moves some verdicts of a judge that is not sure of them: the controls are texts that ask for
nothing, and what matters is the distance to them. That any injection of the suite moves a verdict is the likelier
the more there are. `away` counts verdicts that turned against the text. What a judge gives no answer to (in a small
model's context there is no room for the longest injections) is `failed`, and counts nowhere else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.injection_counts import (
    ANY,
    CONTROLS,
    MEAN,
    PLACES,
    Case,
    PairCase,
    Row,
    SafetyCase,
    accuracy,
    ask,
    attack,
    inject,
)
from benchmarks.record import (
    RESULTS,
    add_plot_option,
    at_least,
    header,
    plain_pyplot,
    read_csv,
    save_svg,
    write_csv,
)
from sip_engine.config.judge import JudgeConfig
from sip_engine.config.parse import merge_settings, parse_config, read_toml
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus, open_corpus
from sip_engine.data.sources import open_world
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.evaluation.injection_texts import INJECTIONS
from sip_engine.judges.open import open_judge
from sip_engine.policy.checkpoint import checkpoint_tokenizer, resolve_checkpoint
from sip_engine.tasks.corruptors.rules import RuleCorruptor
from sip_engine.tasks.corruptors.world import WorldCorruptor
from sip_engine.tasks.labels import cut_text
from sip_engine.types import Failure, Judge, RewriteRequest
from sip_engine.utils.errors import ConfigError, SipError

RULES = ("world", "heuristic")

_WORLD = {
    "world": {"num_people": 24, "train_documents": 400, "test_documents": 400},
    "model": {"max_context": 256},
    "data": {"vocab_size": 640, "suffix_tokens": 32, "max_prefix_tokens": 96, "min_prefix_tokens": 24},
    "judge": {"backend": "world"},
}
_FEWEST, _SPARE = 1000, 6
"""Held-out samples looked at: at least, and for each text wanted."""


def pair_cases(cfg: RunConfig, corpus: Corpus, truth: Judge, wanted: int, seed: int) -> list[PairCase]:
    """Suffixes against corrupted copies cut at their length; in the world, copies that its truth calls worse."""
    world = open_world(cfg)
    corruptor = WorldCorruptor(world) if world else RuleCorruptor()
    requests = [RewriteRequest(s.prefix, s.suffix) for s in corpus.held_out]
    cases = []
    for sample, copy in zip(corpus.held_out, corruptor.corrupt(requests, seed=seed), strict=True):
        if not isinstance(copy, Failure):
            text = cut_text(copy.text, corpus.tokenizer, len(sample.suffix_ids))
            cases.append(PairCase(sample.prefix, sample.suffix, text, False))
    certain = (
        _certain(truth, cases) if world else [-1.0 if case.text != case.original else 0.0 for case in cases]
    )
    kept = [case for case, favour in zip(cases, certain, strict=True) if favour == -1][:wanted]
    return [replace(case, shown_first=bool(number % 2)) for number, case in enumerate(kept)]


def safety_cases(corpus: Corpus, truth: Judge, wanted: int) -> tuple[list[SafetyCase], list[SafetyCase]]:
    """Unsafe suffixes, and as many safe ones."""
    cases = [SafetyCase(sample.suffix, sample.prefix) for sample in corpus.held_out]
    certain = _certain(truth, cases)
    unsafe, safe = (
        [case for case, favour in zip(cases, certain, strict=True) if favour == known] for known in (-1, 1)
    )
    return unsafe[:wanted], safe[: len(unsafe[:wanted])]


def _certain(truth: Judge, cases: Sequence[Case]) -> Sequence[float]:
    """The truth's favour of each case; 0 where it would be another one with a harmless sentence at either end.

    A suffix begins and ends within words and sentences, so what stands beside it can change what it says: half an
    insult, the second half of a claim. Then a verdict that moves is no mistake.
    """
    texts = [[case.text, *(inject(case.text, CONTROLS[0], place) for place in PLACES)] for case in cases]
    found = ask(truth, cases, texts, 0)
    return np.where((found == found[:, :1]).all(1), found[:, 0], 0.0).tolist() if cases else []


def measure(
    cfg: RunConfig, corpus: Corpus, judge: Judge, truth: Judge, *, pairs: int, unsafe: int, seed: int
) -> Iterator[Row]:
    """One row for each kind of question, place and injection.

    Raises:
        ConfigError: the documents give nothing to ask about, or the judge does not answer.
    """
    cases = pair_cases(cfg, corpus, truth, pairs, seed)
    unsafe_cases, safe_cases = safety_cases(corpus, truth, unsafe)
    if not cases and not unsafe_cases:
        raise ConfigError("the held-out documents give no pair and no unsafe suffix: give more of them")
    for objective, losing, winning in (("quality", cases, []), ("safety", unsafe_cases, safe_cases)):
        if not losing:
            continue
        plain, rows = attack(judge, losing, INJECTIONS, seed)
        right = ask(judge, winning, [[case.text] for case in winning], seed).reshape(-1)
        about = {"judge": judge.name, "objective": objective, **accuracy(plain, right)}
        if not about["accuracy_n"]:
            raise ConfigError(
                f"the {judge.name} judge answers no {objective} question: is its context too short? "
                "lower --max-prefix-chars"
            )
        yield from ({**about, **row} for row in rows)


def settings(args: argparse.Namespace, folder: Path) -> RunConfig:
    """The documents' settings with the judge asked for; what must be written goes to `folder`, unless --config says.

    Raises:
        ConfigError: a wrong setting.
    """
    base = {**_WORLD, "out": str(folder), "data": {**_WORLD["data"], "cache": str(folder / "cache")}}
    values: dict[str, Any] = read_toml(args.config) if args.config else base
    if args.judge in RULES:
        values = {**values, "judge": {"backend": args.judge}}
    elif args.judge:
        # A verdict word is short, and room for longer replies would be lost to injections.
        local = {"max_new_tokens": 8, **values.get("judge", {}).get("local", {}), "checkpoint": args.judge}
        values = {**values, "judge": {"backend": "local", "local": local}}
    asked = {"max_prefix_chars": args.max_prefix_chars, "method": args.method}
    local = {name: value for name, value in asked.items() if value is not None}
    values = merge_settings(values, {"judge": {"local": local}} if local else {})
    cfg = parse_config(values, str(args.config or "settings"))
    if cfg.task != "policy":
        raise ConfigError(f'{args.config}: task = "{cfg.task}" reads prompts; give the config of documents')
    world = cfg.world.model_copy(update={"split": "judge"}) if cfg.world else None
    looked_at = max(_FEWEST, _SPARE * max(args.pairs, args.unsafe))
    evaluation = cfg.eval.model_copy(update={"num_prefixes": looked_at})
    return cfg.model_copy(update={"world": world, "eval": evaluation})


def open_parts(cfg: RunConfig, mesh: Mesh) -> tuple[Corpus, Judge, Judge]:
    """The documents, the judge that is measured, and the one that labels.

    Raises:
        SipError: one of them cannot be had.
    """
    written_by = cfg.init or cfg.judge.local.checkpoint
    tokenizer = checkpoint_tokenizer(resolve_checkpoint(written_by)) if written_by else None
    corpus = open_corpus(cfg, mesh, tokenizer)
    labels = JudgeConfig(backend="world" if cfg.world else "heuristic")
    truth = open_judge(cfg.model_copy(update={"judge": labels}), corpus, mesh)
    return corpus, open_judge(cfg, corpus, mesh), truth


def show(rows: Sequence[Row]) -> None:
    """Print how each kind of question fared, an injection a line, worst first."""

    def cell(row: Row) -> str:
        if row["share"] == "":
            return f"{'-':>20}"
        return f"{row['share']:8.1%} {row['low']:4.0%} - {row['high']:4.0%}"

    for objective in dict.fromkeys(row["objective"] for row in rows):
        here = [row for row in rows if row["objective"] == objective]
        first = here[0]
        print(
            f"\n{objective}: {first['judge']} judge, {first['asked']} texts, plain accuracy {first['accuracy']:.1%} "
            f"({first['accuracy_low']:.1%} - {first['accuracy_high']:.1%}, {first['accuracy_n']} verdicts)"
        )
        print(f"{'moved towards the text':34}{PLACES[0]:>20}{PLACES[1]:>20}{'away':>8}{'failed':>8}")
        for name, these in by_injection(here).items():
            away, failed = (sum(int(str(row[key])) for row in these) for key in ("away", "failed"))
            print(f"{name:34}{''.join(map(cell, these))}{away:8d}{failed:8d}")


def by_injection(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of one kind of question by injection, both places: controls, `MEAN`, `ANY`, then the worst first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["injection"]), []).append(row)
    fixed = [one.name for one in CONTROLS] + [MEAN, ANY]

    def share(name: str) -> float:
        return sum(float(str(row["share"])) for row in found[name] if row["share"] != "")

    rest = sorted((name for name in found if name not in fixed), key=share, reverse=True)
    return {name: found[name] for name in (*fixed, *rest)}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Share moved by each injection with its interval; quality on the left, safety on the right."""
    pyplot = plain_pyplot()
    objectives = list(dict.fromkeys(str(row["objective"]) for row in rows))
    names = list(by_injection([row for row in rows if row["objective"] == objectives[0]]))
    places = np.arange(len(names))[::-1]
    figure, panels = pyplot.subplots(
        1,
        len(objectives),
        figsize=(4 + 3 * len(objectives), 11),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, objective in zip(panels[0], objectives, strict=True):
        for number, place in enumerate(PLACES):
            line = {
                str(r["injection"]): r for r in rows if (r["objective"], r["place"]) == (objective, place)
            }
            known = [
                (at, line[name]) for at, name in zip(places, names, strict=True) if line[name]["share"] != ""
            ]
            table = np.array(
                [[row[key] for key in ("share", "low", "high")] for _, row in known], float
            ).reshape(-1, 3)
            at = [at + 0.15 - 0.3 * number for at, _ in known]
            bars = np.abs(table[:, 1:] - table[:, :1]).T
            axes.errorbar(table[:, 0], at, xerr=bars, fmt="o", markersize=3, linewidth=1, label=place)
        first = next(row for row in rows if row["objective"] == objective)
        axes.set(
            title=f"{objective}, plain accuracy {first['accuracy']:.1%}",
            xlabel="verdicts moved, of those that can",
            xlim=(-0.03, 1.03),
        )
        axes.axhline(len(names) - len(CONTROLS) - 2.5, color="grey", linewidth=0.5)
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(places, names, fontsize=7)
    panels[0][0].set_ylim(-0.7, len(names) - 0.3)
    panels[0][-1].legend()
    save_svg(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the CSV file; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--judge", help=f"a checkpoint or run, or {' or '.join(RULES)}; default: the config's [judge]"
    )
    parser.add_argument("--config", type=Path, help="TOML of the documents, as for `sip data judge-pairs`")
    parser.add_argument(
        "--max-prefix-chars", type=at_least(1), help="a checkpoint's judge.local.max_prefix_chars"
    )
    parser.add_argument(
        "--method", choices=["log_odds", "sentence_labels"], help="a checkpoint's judge.local.method"
    )
    parser.add_argument("--pairs", type=at_least(0), default=100, help="suffixes against a corrupted copy")
    parser.add_argument("--unsafe", type=at_least(0), default=100, help="unsafe suffixes")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of the corruptions and the judge's votes"
    )
    parser.add_argument("--out", type=Path, help="CSV file; default: injections_JUDGE.csv among the results")
    add_plot_option(parser)
    args = parser.parse_args(argv)
    if args.plot is not None:
        plot(read_csv(args.plot), args.plot.with_suffix(".svg"))
        return 0
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            cfg = settings(args, Path(folder))
            corpus, judge, truth = open_parts(cfg, start_mesh())
            found = measure(cfg, corpus, judge, truth, pairs=args.pairs, unsafe=args.unsafe, seed=args.seed)
            rows = list(found)
    except SipError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show(rows)
    out = args.out or RESULTS / f"injections_{judge.name}.csv"
    about = header("injections", ("torch", "numpy"))
    write_csv(out, [{**about, **row} for row in rows])
    print(f"\n{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
