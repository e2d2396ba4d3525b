"""How often does the heuristic judge prefer real text? Held-out documentation of the standard library.

    python -m benchmarks heuristic_judge [--seed 0]

The documents are the docstrings of each standard library module and the topics of `pydoc`, every paragraph
once. The judge counts four fifths of them; cuts of the last fifth give prefixes and original suffixes.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from sip_engine.judges.heuristic.judge import HeuristicJudge
from sip_engine.judges.heuristic.quality import cut_windows
from sip_engine.types import FactualityQuestion, PairQuestion, Question, SafetyQuestion, Score

_MIN_DOCUMENT_CHARS = 400
_OTHER_PEOPLES_CODE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3"}
_SENTENCE = re.compile(r".{20,}?[.!?](?=\s|$)", re.DOTALL)
_NUMBER = re.compile(r"\d+")


class Cut(NamedTuple):
    """A prefix and its original suffix, from document number `document`."""

    document: int
    prefix: str
    suffix: str


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the documents and random choices")
    rng = random.Random(parser.parse_args(argv).seed)
    documents = list(stdlib_documents())
    rng.shuffle(documents)
    num_counted = len(documents) * 4 // 5
    counted, held_out = documents[:num_counted], documents[num_counted:]
    cuts = [Cut(i, prefix, suffix) for i, text in enumerate(held_out) for prefix, suffix in cut_windows(text)]
    started = time.perf_counter()
    judge = HeuristicJudge.from_texts(counted)
    print(
        f"{len(counted)} documents ({sum(map(len, counted)) / 1e6:.2f} M characters) counted in "
        f"{time.perf_counter() - started:.1f} s; {len(cuts)} cuts of {len(held_out)} held-out documents\n"
    )
    report_pairs(judge, cuts, rivals(cuts, counted, rng))
    report_single_answers(judge, cuts, rng)
    report_speed(counted, cuts)


def stdlib_documents() -> Iterator[str]:
    """The topics of `pydoc`, then the docstrings of each module, read from its source, not imported."""
    seen: set[str] = set()
    root = Path(sysconfig.get_path("stdlib"))
    sources = (path for path in sorted(root.rglob("*.py")) if not _OTHER_PEOPLES_CODE & set(path.parts))
    for paragraphs in (*(topics[name].split("\n\n") for name in sorted(topics)), *map(_docstrings, sources)):
        new = [text for text in dict.fromkeys(paragraphs) if text not in seen]
        seen.update(new)
        document = "\n\n".join(new)
        if len(document) >= _MIN_DOCUMENT_CHARS:
            yield document


def _docstrings(source: Path) -> list[str]:
    try:
        tree = ast.parse(source.read_bytes())
    except SyntaxError:
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [paragraph for text in texts if text for paragraph in text.split("\n\n")]


def rivals(
    cuts: Sequence[Cut], counted: Sequence[str], rng: random.Random
) -> dict[str, Callable[[Cut], str]]:
    """What stands against the original suffix, as long as it in words unless it says otherwise."""
    generate = trigram_generator(counted, rng)
    return {
        "its words shuffled": lambda cut: " ".join(rng.sample(cut.suffix.split(), len(cut.suffix.split()))),
        "its first sentence repeated": lambda cut: _repeat_sentence(cut.suffix),
        "suffix of another document": lambda cut: _other_document(cut, cuts, rng).suffix,
        "trigram-generated text": lambda cut: generate(cut.prefix, len(cut.suffix.split())),
        "itself, last quarter cut (bias)": lambda cut: _first_share(cut.suffix, 0.75),
    }


def _repeat_sentence(text: str) -> str:
    match = _SENTENCE.search(text)
    words = match.group().split() if match else text.split()[:12]
    num_words = len(text.split())
    return " ".join((words * (num_words // len(words) + 1))[:num_words])


def _other_document(cut: Cut, cuts: Sequence[Cut], rng: random.Random) -> Cut:
    while (other := rng.choice(cuts)).document == cut.document:
        pass
    return other


def _first_share(text: str, share: float) -> str:
    words = text.split()
    return " ".join(words[: int(share * len(words))])


def trigram_generator(texts: Iterable[str], rng: random.Random) -> Callable[[str, int], str]:
    """Continues a prefix with words drawn as they follow the last two words, or the last one, in `texts`."""
    followers: dict[tuple[str, ...], list[str]] = {}
    words: list[str] = []
    for text in texts:
        words = text.split()
        for first, second, third in zip(words, words[1:], words[2:], strict=False):
            followers.setdefault((first, second), []).append(third)
            followers.setdefault((second,), []).append(third)
    contexts = sorted(followers)

    def generate(prefix: str, num_words: int) -> str:
        written = prefix.split()[-2:]
        while len(written) < num_words + 2:
            choices = followers.get(tuple(written[-2:])) or followers.get((written[-1],))
            written.append(rng.choice(choices or followers[rng.choice(contexts)]))
        return " ".join(written[2:])

    return generate


def ask(judge: HeuristicJudge, questions: Sequence[Question]) -> list[float]:
    """The values of the answers; the heuristic judge has one for every question."""
    return [judgment.value for judgment in judge.judge(questions) if isinstance(judgment, Score)]


def report_pairs(
    judge: HeuristicJudge, cuts: Sequence[Cut], against: dict[str, Callable[[Cut], str]]
) -> None:
    """Accuracy counts a tie as one half; on a cut copy of the original 50 % is right."""
    print(f"{'original suffix against':<32} {'better':>8} {'tie':>8} {'worse':>8} {'accuracy':>9}")
    for name, write in against.items():
        answers = ask(judge, [PairQuestion(cut.prefix, cut.suffix, write(cut)) for cut in cuts])
        share = {value: count / len(answers) for value, count in Counter(answers).items()}
        better, tie, worse = (share.get(value, 0.0) for value in (1.0, 0.5, 0.0))
        print(f"{name:<32} {better:8.1%} {tie:8.1%} {worse:8.1%} {better + tie / 2:9.1%}")
    print()


def report_single_answers(judge: HeuristicJudge, cuts: Sequence[Cut], rng: random.Random) -> None:
    """Shares of the answers to safety and factuality questions."""
    with_number = [cut for cut in cuts if _NUMBER.search(cut.suffix)]
    groups: dict[str, list[Question]] = {
        "safety: original": [SafetyQuestion(cut.suffix) for cut in cuts],
        "factuality: original": [FactualityQuestion(*cut[1:], cut.suffix) for cut in cuts],
        "factuality: every number changed": [
            FactualityQuestion(*cut[1:], _NUMBER.sub(lambda number: str(int(number[0]) + 7), cut.suffix))
            for cut in with_number
        ],
        "factuality: another document's": [
            FactualityQuestion(*cut[1:], _other_document(cut, cuts, rng).suffix) for cut in cuts
        ],
        "factuality: 'I do not know.'": [FactualityQuestion(*cut[1:], "I do not know.") for cut in cuts],
    }
    print(f"{'answers about a suffix':<34} {'number':>6} {'1':>8} {'0.5':>8} {'0':>8}")
    for name, questions in groups.items():
        answers = ask(judge, questions)
        shares = [answers.count(value) / len(answers) for value in (1.0, 0.5, 0.0)]
        print(f"{name:<34} {len(answers):>6} " + " ".join(f"{share:8.1%}" for share in shares))
    print()


def report_speed(counted: Sequence[str], cuts: Sequence[Cut]) -> None:
    """Processor time; candidates are the suffixes of other cuts."""
    judge = HeuristicJudge.from_texts(counted)
    suffixes = [cut.suffix for cut in cuts]
    pairs: list[Question] = [
        PairQuestion(cut.prefix, suffixes[(at + i) % len(cuts)], suffixes[(at + j) % len(cuts)])
        for at, cut in enumerate(cuts)
        for i in range(8)
        for j in range(i)
    ]
    first_only = [PairQuestion(cut.prefix, cut.suffix, suffixes[at - 1]) for at, cut in enumerate(cuts)]
    facts = [
        FactualityQuestion(cut.prefix, cut.suffix, suffixes[(at + i) % len(cuts)])
        for at, cut in enumerate(cuts)
        for i in range(8)
    ]
    safety = [SafetyQuestion(cut.suffix) for cut in cuts]
    for name, questions in (
        ("pair, one a prefix", first_only),
        ("pair, all of eight candidates a prefix", pairs),
        ("factuality, eight candidates a prefix", facts),
        ("safety", safety),
    ):
        started = time.process_time()
        judge.judge(questions)
        per_question = (time.process_time() - started) / len(questions)
        print(f"{name:<40} {per_question * 1e6:6.0f} us of processor time a question")


if __name__ == "__main__":
    main()
