"""The heuristic judge against literal truths, a brute-force trigram model, and documentation of the library."""

from __future__ import annotations

import importlib
import inspect
import math
import random
from collections import Counter, defaultdict
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydoc_data.topics import topics

from sip_engine.errors import ConfigError, DataError
from sip_engine.judges.features import PrefixView, measure
from sip_engine.judges.heuristic import HeuristicJudge
from sip_engine.judges.lexicon import Lexicon
from sip_engine.judges.ngram import NgramModel, split_words
from sip_engine.judges.quality import QualityModel, cut_windows
from sip_engine.types import FactualityQuestion, PairQuestion, SafetyQuestion, Score

MODULES = (
    "argparse ast bdb calendar cmd code csv ctypes.util decimal difflib doctest email.message fractions ftplib functools "
    "heapq http.client imaplib inspect io json locale logging mailbox optparse os pathlib pickletools pstats queue random "
    "re sched shutil smtplib socket statistics string subprocess tarfile tempfile textwrap threading timeit tokenize "
    "traceback turtle typing unittest.mock urllib.parse urllib.request uuid weakref webbrowser zipfile"
)


def module_document(name: str) -> str:
    """Docstrings of a module, its classes and functions: text that `pydoc`'s topics do not hold."""
    module = importlib.import_module(name)
    own = [item for item in vars(module).values() if getattr(item, "__module__", None) == name]
    texts = [inspect.getdoc(item) for item in (module, *own)]
    return "\n\n".join(dict.fromkeys(text for text in texts if text))


@pytest.fixture(scope="module")
def judge() -> HeuristicJudge:
    seen: set[str] = set()
    texts = []
    for name in sorted(topics):  # Many topics share paragraphs.
        new = [paragraph for paragraph in topics[name].split("\n\n") if paragraph not in seen]
        seen.update(new)
        texts.append("\n\n".join(new))
    return HeuristicJudge.from_texts(texts)


@pytest.fixture(scope="module")
def windows() -> list[tuple[str, str]]:
    return [window for name in MODULES.split() for window in list(cut_windows(module_document(name)))[:6]]


def answers(judge: HeuristicJudge, questions) -> list[float]:
    judgments = judge.judge(questions)
    assert len(judgments) == len(questions)
    assert all(isinstance(judgment, Score) and judgment.votes == (judgment.value,) for judgment in judgments)
    return [judgment.value for judgment in judgments]
