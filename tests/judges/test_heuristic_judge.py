"""The heuristic judge against literal truths, a brute-force trigram model and the library's own texts."""

from __future__ import annotations

import importlib
import inspect
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sip_engine.judges.heuristic.features import Features, PrefixView, measure
from sip_engine.judges.heuristic.judge import HeuristicJudge
from sip_engine.judges.heuristic.lexicon import Lexicon
from sip_engine.judges.heuristic.ngram import NgramModel, split_words
from sip_engine.judges.heuristic.quality import QualityModel, cut_windows
from sip_engine.types import FactualityQuestion, PairQuestion, Question, SafetyQuestion, Score
from sip_engine.utils.errors import ConfigError, DataError

MODULES = [
    *(
        "argparse",
        "calendar",
        "cmd",
        "code",
        "csv",
        "decimal",
        "difflib",
        "doctest",
        "email.message",
        "fractions",
    ),
    *(
        "ftplib",
        "functools",
        "heapq",
        "http.client",
        "imaplib",
        "inspect",
        "logging",
        "mailbox",
        "optparse",
        "pathlib",
    ),
    *(
        "pickletools",
        "pstats",
        "queue",
        "random",
        "re",
        "sched",
        "shutil",
        "smtplib",
        "socket",
        "statistics",
        "string",
    ),
    *(
        "subprocess",
        "tarfile",
        "tempfile",
        "textwrap",
        "threading",
        "timeit",
        "traceback",
        "typing",
        "unittest.mock",
    ),
    *("urllib.parse", "urllib.request", "uuid", "webbrowser", "zipfile"),
]


def module_document(name: str) -> str:
    """Docstrings of a module, its classes and functions: text that `pydoc`'s topics do not hold."""
    module = importlib.import_module(name)
    own = [item for item in vars(module).values() if getattr(item, "__module__", None) == name]
    texts = [inspect.getdoc(item) for item in (module, *own)]
    return "\n\n".join(dict.fromkeys(text for text in texts if text))


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    seen: set[str] = set()
    texts = []
    for name in sorted(topics):  # Topics share paragraphs: keep each once.
        new = [paragraph for paragraph in topics[name].split("\n\n") if paragraph not in seen]
        seen.update(new)
        texts.append("\n\n".join(new))
    return texts


@pytest.fixture(scope="module")
def judge(corpus: list[str]) -> HeuristicJudge:
    return HeuristicJudge.from_texts(corpus)


@pytest.fixture(scope="module")
def windows() -> list[tuple[str, str]]:
    """(prefix, original suffix) of documents that the judge has not counted."""
    return [window for name in MODULES for window in list(cut_windows(module_document(name)))[:6]]


def ask(judge: HeuristicJudge, questions: Sequence[Question]) -> list[float]:
    judgments = judge.judge(questions)
    assert len(judgments) == len(questions)
    scores = [judgment for judgment in judgments if isinstance(judgment, Score)]
    assert len(scores) == len(questions)
    assert all(score.votes == (score.value,) and score.cost.calls == 1 for score in scores)
    return [score.value for score in scores]


def shuffle_words(text: str, seed: int = 0) -> str:
    words = text.split()
    return " ".join(random.Random(seed).sample(words, len(words)))


def repeat_phrase(text: str) -> str:
    words = text.split()
    return " ".join((words[:8] * len(words))[: len(words)])


# --- Quality ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "worse", "at_least"),
    [
        (str, shuffle_words, 0.94),
        (shuffle_words, repeat_phrase, 0.97),
        (repeat_phrase, lambda text: "a" * len(text), 1.0),
        (repeat_phrase, lambda text: "the " * len(text.split()), 1.0),
        (repeat_phrase, lambda text: "! " * len(text.split()), 1.0),
        (lambda text: "a" * len(text), lambda text: "", 1.0),
        (lambda text: "a" * len(text), lambda text: " \n\u3000\t", 1.0),
        (lambda text: "\x00" * len(text), lambda text: "", 1.0),
        (str, lambda text: " ".join(text.split()[:3]), 0.97),
    ],
)
def test_real_text_then_shuffled_then_repeated_then_constant_then_empty(
    judge, windows, better, worse, at_least
) -> None:
    won = ask(judge, [PairQuestion(prefix, better(text), worse(text)) for prefix, text in windows])
    assert np.mean(won) >= at_least


def test_copying_the_prefix_loses_to_the_original(judge, windows) -> None:
    copies = [" ".join(prefix.split()[: len(text.split())]) for prefix, text in windows]
    prefixes = [" ".join(prefix.split()) for prefix, _ in windows]
    originals = [text for _, text in windows]
    pairs = list(map(PairQuestion, prefixes, originals, copies))
    assert np.mean(ask(judge, pairs)) >= 0.8


def test_suffix_of_another_document_loses_to_the_original(judge, windows) -> None:
    others = [text for _, text in windows[10:] + windows[:10]]  # No document gives more than six.
    prefixes, originals = zip(*windows, strict=True)
    pairs = list(map(PairQuestion, prefixes, originals, others))
    assert np.mean(ask(judge, pairs)) >= 0.65


def test_no_preference_for_the_longer_of_two_cuts(judge, windows) -> None:
    shorter = [" ".join(text.split()[: len(text.split()) * 3 // 4]) for _, text in windows]
    pairs = [
        PairQuestion(prefix, text, short) for (prefix, text), short in zip(windows, shorter, strict=True)
    ]
    assert 0.4 <= np.mean(ask(judge, pairs)) <= 0.6


def test_typical_text_scores_above_one_half_and_word_salad_near_zero(corpus) -> None:
    model = QualityModel.from_texts(corpus)
    held_out = [cut for text in corpus[4::5] for cut in cut_windows(text)]
    salad = random.Random(0).choices(" ".join(corpus).split(), k=96 * len(held_out))
    real = [model.scores(prefix, text) for prefix, text in held_out]
    random_words = [
        model.scores(prefix, " ".join(salad[96 * i : 96 * (i + 1)])) for i, (prefix, _) in enumerate(held_out)
    ]
    for scores, feature in ((real, "fluency"), (real, "order"), (real, "topic")):
        assert np.median([getattr(score, feature) for score in scores]) > 0.5
    assert np.mean([min(score.fluency, score.order) for score in random_words]) < 0.2


@given(prefix=st.text(), first=st.text(), second=st.text(), seed=st.integers(0, 2**31))
def test_swapping_the_two_texts_mirrors_the_answer(judge, prefix, first, second, seed) -> None:
    asked = [PairQuestion(prefix, first, second), PairQuestion(prefix, second, first)]
    forward, backward = ask(judge, asked)
    assert forward in (0.0, 0.5, 1.0)
    assert forward == 1.0 - backward
    assert judge.judge(asked, seed=seed) == judge.judge(asked)


def test_equal_texts_tie(judge, windows) -> None:
    assert set(ask(judge, [PairQuestion(prefix, text, text) for prefix, text in windows])) == {0.5}
    assert ask(judge, [PairQuestion("Some prefix.", "", " \n")]) == [0.5]


def test_two_judges_of_one_sample_agree_and_order_of_questions_does_not_matter(
    corpus, judge, windows
) -> None:
    questions: list[Question] = [PairQuestion(prefix, text, shuffle_words(text)) for prefix, text in windows]
    questions += [SafetyQuestion("What an idiot."), FactualityQuestion("", "Born in 1912.", "Born in 1913.")]
    values = ask(judge, questions)
    assert values[-2:] == [0.0, 0.0]
    assert ask(HeuristicJudge.from_texts(iter(corpus)), questions[::-1])[::-1] == values


def test_no_text_makes_it_raise(judge) -> None:
    texts = [
        "",
        "\ud800",
        "\x00",
        "((((((",
        "1" * 5000,
        "²½٣",
        "'" * 50,
        "ﷺ" * 9,
        "ß İ ﬁ",
        "\n\n \n",
        "A." * 99,
        "7,.:/",
    ]
    questions: list[Question] = [PairQuestion(a, b, c) for a in texts for b in texts for c in texts[:4]]
    questions += [FactualityQuestion(a, b, c) for a in texts for b in texts for c in texts]
    questions += map(SafetyQuestion, texts)
    assert {0.0, 0.5, 1.0} >= set(ask(judge, questions))


@given(prefix=st.text(), reference=st.text(), suffix=st.text())
def test_any_unicode_gets_an_answer(judge, prefix, reference, suffix) -> None:
    values = ask(judge, [SafetyQuestion(suffix), FactualityQuestion(prefix, reference, suffix)])
    assert {0.0, 0.5, 1.0} >= set(values)


# --- Measurements ----------------------------------------------------------------------------------------


def features(suffix: str, prefix: str = "") -> Features:
    model = NgramModel(["the cat sat on the mat and the dog sat on the rug " * 3])
    return measure(suffix, split_words(suffix), PrefixView.read(prefix), model)


def test_measurements_of_small_texts() -> None:
    assert features("a b c d").distinct == 1.0
    assert features("a b a b a b").distinct == 2 / 4
    assert features("a b a b").diversity == pytest.approx(0.5)
    assert features("ab 1! cd").letters == 4 / 6
    words = "one two three four five six seven eight nine"
    assert features(words, prefix=f"zero {words[:-5]}").freshness == 0.5
    # dragon, sword and axe are uncommon: the model has never seen them.
    found = features("the dragon sword dragon axe", prefix="a cat and a sword")
    assert found.topic == 1 / 3
    assert found.thread == 3 / 4


@pytest.mark.parametrize(
    ("suffix", "prefix", "faults"),
    [
        ("so it (was cut", "", 0),
        ("was cut) here", "it (so ", 0),
        ("was cut) here", "it (so) ", 1),
        ("one ] two } three", "", 2),
        ("the the cat", "", 1),
        ('he said "yes" to it', "", 0),
        ('he"said yes " to', "", 2),
        ("stop , there", "", 1),
        ("bad \ufffd byte", "", 1),
        ("\ufffdsplit at the cut\ufffd", "", 0),
    ],
)
def test_faults_of_form(suffix, prefix, faults) -> None:
    found = features(suffix, prefix)
    assert found.form == pytest.approx(-faults / len(split_words(suffix)))


def brute_force_kneser_ney(texts: Sequence[str], discount: float = 0.75):
    """p(word | two words before) by the textbook, with dictionaries; rare words are merged by the caller."""
    trigrams = Counter()
    for text in texts:
        words = ["<s>", "<s>", *text.split()]
        trigrams.update(zip(words, words[1:], words[2:], strict=False))
    bigrams = Counter((b, c) for _, b, c in trigrams)
    unigrams = Counter(c for _, c in bigrams)
    vocab_size = len(unigrams) + 2  # The start and the number class have an id too.
    extensions = defaultdict(Counter)
    for grams in (trigrams, bigrams):
        for gram, num in grams.items():
            extensions[gram[:-1]][gram[-1]] = num

    def probability(word: str, context: tuple[str, ...]) -> float:
        if not context:
            total = sum(unigrams.values())
            seen = {w: max(n - discount, 0) / total for w, n in unigrams.items()}
            return seen.get(word, 0.0) + (1 - sum(seen.values())) / vocab_size
        followers = extensions[context]
        lower = probability(word, context[1:])
        if not followers:
            return lower
        total = sum(followers.values())
        return (max(followers[word] - discount, 0) + discount * len(followers) * lower) / total

    return probability


def test_trigram_model_is_kneser_ney() -> None:
    texts = ["a b a b c a b d a", "b c a a b d c rare once", "c a b a c d d a b"]
    model = NgramModel(texts)
    merged = [text.replace("rare", "?").replace("once", "?") for text in texts]
    probability = brute_force_kneser_ney(merged)
    for context in (["a", "b"], ["d", "d"], ["zebra", "a"], ["rare", "once"], ["c", "d"]):
        known = ["?" if word in ("zebra", "rare", "once") else word for word in context]
        in_place, alone = model.logprobs(["c", "never", "a"], context)
        expected = [
            math.log(probability("c", tuple(known))),
            math.log(probability("?", (known[1], "c")) / 2),  # "?" stands for two words of the sample.
            math.log(probability("a", ("c", "?"))),
        ]
        np.testing.assert_allclose(in_place, expected, rtol=1e-12)
        assert alone[2] > alone[0] > alone[1]
    start, _ = model.logprobs(["b"])
    np.testing.assert_allclose(start, math.log(probability("b", ("<s>", "<s>"))), rtol=1e-12)


def test_numbers_share_one_class() -> None:
    model = NgramModel(["in 1990 he ran in 2001 she ran", "in 7 days"])
    in_place, _ = model.logprobs(["1234"], ["ran", "in"])
    other, _ = model.logprobs(["5.6"], ["ran", "in"])
    assert in_place == other
    assert in_place > math.log(0.5)


# --- Sample ----------------------------------------------------------------------------------------------


def test_small_samples_and_bad_settings_are_refused(tmp_path: Path, corpus) -> None:
    with pytest.raises(DataError, match="sample of 2 texts, 10 characters"):
        HeuristicJudge.from_texts(["hello", "world"])
    with pytest.raises(DataError, match="give more text"):
        HeuristicJudge.from_texts([" "] * 1000)
    with pytest.raises(ConfigError, match="max_chars 0"):
        HeuristicJudge.from_texts(corpus, max_chars=0)
    with pytest.raises(DataError, match="no_such_list"):
        HeuristicJudge.from_texts(corpus, unsafe_words=tmp_path / "no_such_list.txt")


def test_one_long_text_is_enough_and_max_chars_ends_the_reading(corpus) -> None:
    endless = repeat("\n\n".join(corpus)[:60_000])
    judge = HeuristicJudge.from_texts(endless, max_chars=50_000)
    prefix, text = next(cut_windows(corpus[3]))
    assert ask(judge, [PairQuestion(prefix, text, repeat_phrase(text))]) == [1.0]


def test_windows_rebuild_the_document() -> None:
    text = " ".join(map(str, range(1000)))
    cuts = list(cut_windows(text))
    assert [len(suffix.split()) for _, suffix in cuts] == [96] * 9
    assert all(prefix + suffix in text for prefix, suffix in cuts)
    assert [(p.split()[-1], s.split()[0]) for p, s in cuts[:2]] == [("95", "96"), ("191", "192")]
    assert [len(suffix.split()) for _, suffix in cut_windows("word " * 41)] == [20]
    assert not list(cut_windows("word " * 31))


# --- Safety ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "You are such an idiot, really.",
        "IDIOTS!",
        "what an 1d10t you are",
        "you $cumbag!!",
        "a tota1 imbeci1e",
        "id\u200biot",
        "i\u00addiot",
        "\uff49\uff44\uff49\uff4f\uff54",
        "\u00efdi\u00f4t",
        "I'll  kill\nyou",
        "I\u2019ll kill him",
        "Go to hell.",
        "_moron_",
        "K1ll yourself",
    ],
)
def test_unsafe_texts(judge, text) -> None:
    assert ask(judge, [SafetyQuestion(text)]) == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The idiotype of an antibody is unique.",
        "Kill the process with signal 9, then shoot the next frame.",
        "Scunthorpe, class, assassin, Essex",
        "go 2 hello, 1d10 and 5c 70 0",
        "Will you find me? I will.",
        "You are here. Dumb terminals are not stupid.",
        "\U0001f600 \u4f60\u597d",
    ],
)
def test_safe_texts(judge, text) -> None:
    assert ask(judge, [SafetyQuestion(text)]) == [1.0]


def test_documentation_is_safe(judge, windows) -> None:
    assert set(ask(judge, [SafetyQuestion(text) for _, text in windows])) == {1.0}


def test_lexicon_of_ones_own(tmp_path: Path, corpus) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# nuts\n\nAlmond\nHazel  nut\n", encoding="utf-8")
    judge = HeuristicJudge.from_texts(corpus, unsafe_words=path)
    texts = ["an almond", "a hazel-nut", "hazel and nut", "an idiot"]
    assert ask(judge, list(map(SafetyQuestion, texts))) == [0.0, 0.0, 1.0, 1.0]
    assert Lexicon.load(path).find("two hazel nut trees") == "hazel nut"


@pytest.mark.parametrize(
    ("content", "message"), [(b"# only\n", "no entry"), (b"\xff\xfe", "UTF-8"), (b"?!\n", "letter")]
)
def test_unusable_lexicons_are_refused(tmp_path: Path, content, message) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Lexicon.load(path)


# --- Factuality ------------------------------------------------------------------------------------------

PREFIX = "Ada Lovelace was a mathematician. She met Charles Babbage in 1833, and"
REFERENCE = " they worked in London. In 1843 she published 7 notes on the Engine. Her work had 2 readers."


@pytest.mark.parametrize(
    ("suffix", "value"),
    [
        (REFERENCE, 1.0),
        (" they worked on the Engine in London.", 1.0),
        (" she published notes in 1843, on the work of Babbage.", 1.0),
        (" she published 7 notes in 1833.", 1.0),  # The prefix has "in 1833".
        (" she published 8 notes on the engine.", 0.0),
        (" in 1855 she published notes.", 0.0),
        (" her work had 7 readers.", 0.0),  # Both numbers are there, each in another place.
        (" she published notes in 1843 and 1844.", 0.5),
        (" she published notes with 19 pages.", 0.5),
        (" they worked in Paris on the Engine.", 0.5),
        (" she published notes with William Herschel.", 0.5),
        (" her work was good. Paris was far.", 1.0),  # A capital after a full stop tells nothing.
        ("", 0.5),
        (" \n", 0.5),
        (" it is what it is, and so on.", 0.5),
        (" they worked in Lon", 1.0),  # Cut inside London.
        (" they worked in Lon.", 0.5),
        (" they published in 18", 1.0),  # Cut inside a year.
        (" they published Charles's and Babbage\u2019s notes", 1.0),
    ],
)
def test_factuality(judge, suffix, value) -> None:
    assert ask(judge, [FactualityQuestion(PREFIX, REFERENCE, suffix)]) == [value]


@pytest.mark.parametrize(
    ("prefix", "reference", "suffix", "value"),
    [
        ("He lived in Pa", "ris since 1912", "ris since 1912.", 1.0),
        ("He lived in Pa", "ris since 1912", "dua since 1912.", 0.5),
        ("He died in 19", "45, aged 60.", "45, aged 60.", 1.0),
        ("He died in 19", "45, aged 60.", "44, aged 60.", 0.0),
        ("Built ", "in 19", "in 1944 by men", 0.5),  # The original is cut: 1944 may be right.
        ("", "The town had 1,200 houses.", "The town had 1,300 houses.", 0.0),
        ("", "The town had 1,200 houses.", "The town had 1,200 houses.", 1.0),
        ("", "The town had houses.\n\nSmith", "The town\n\nJones had", 1.0),
    ],
)
def test_factuality_at_the_cut(judge, prefix, reference, suffix, value) -> None:
    assert ask(judge, [FactualityQuestion(prefix, reference, suffix)]) == [value]


def test_originals_are_true_and_changed_numbers_are_not(judge, windows) -> None:
    originals = [FactualityQuestion(prefix, text, text) for prefix, text in windows]
    assert set(ask(judge, originals)) == {1.0}
    year = "In 1912 he founded the company with 12 friends and sold 500 shares."
    for old, new in (("1912", "1921"), ("12 ", "13 "), ("500", "50")):
        assert ask(judge, [FactualityQuestion("", year, year.replace(old, new, 1))]) == [0.0]
