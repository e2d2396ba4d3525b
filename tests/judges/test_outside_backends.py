"""A judge, a rewriter and a corruptor from outside: added by a call or an entry point, named in a config, asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sip_engine.config.backends import CORRUPTORS, JUDGES, REWRITERS
from sip_engine.config.parse import parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.judges.open import open_judge, register_judge
from sip_engine.rewriters.open import register_rewriter
from sip_engine.tasks.corruptors.base import Corruption
from sip_engine.tasks.corruptors.open import register_corruptor
from sip_engine.tasks.specs import JudgePairs
from sip_engine.train import train
from sip_engine.types import Failure, Judgment, PairQuestion, Question, RewriteRequest, Score
from sip_engine.utils.errors import ConfigError


class MoreOfALetter:
    """Likes the text with more of a letter; everything is safe and true."""

    name = "letters"
    deterministic = True

    def __init__(self, letter: str) -> None:
        self.letter = letter

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        del seed
        return [Score(value, (value,)) for value in map(self._value, questions)]

    def _value(self, question: Question) -> float:
        if not isinstance(question, PairQuestion):
            return 1.0
        first, second = (text.count(self.letter) for text in (question.first, question.second))
        return 0.5 + 0.5 * ((first > second) - (first < second))


class Shouter:
    """Writes a suffix in capitals."""

    name = "shouter"

    def rewrite(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[str | Failure]:
        del seed
        return [request.suffix.upper() for request in requests]

    def corrupt(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[Corruption | Failure]:
        del seed
        return [Corruption(request.suffix.upper(), "shout") for request in requests]


@pytest.fixture
def outside() -> Iterator[None]:
    @register_judge("letters")
    def judge(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> MoreOfALetter:
        if len(cfg.judge.options.get("letter", "e")) != 1:
            raise ConfigError("judge.options.letter: must be one letter")
        assert corpus.num_samples > 0 and mesh.size == 1
        return MoreOfALetter(cfg.judge.options.get("letter", "e"))

    register_rewriter("shouter")(lambda cfg, corpus, mesh: Shouter())
    register_corruptor("shouter")(lambda cfg, corpus, mesh: Shouter())
    yield
    JUDGES.forget("letters")
    REWRITERS.forget("shouter")
    CORRUPTORS.forget("shouter")


def config(folder: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "out": folder / "run",
        "steps": 1,
        "batch_size": 4,
        "world": {"num_people": 12, "train_documents": 60, "test_documents": 30},
        "data": {"suffix_tokens": 12, "max_prefix_tokens": 40, "min_prefix_tokens": 8, "vocab_size": 500},
        "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 64}
        | {"max_context": 96},
        "candidates": [{"original": True, "rewrite": True, "rollouts": 0}],
        "judge": {"backend": "letters", "options": {"letter": "A"}},
        "rewriter": {"backend": "shouter"},
        "corruptor": {"backend": "shouter"},
        "eval": {"num_prefixes": 4, "generate": False, "every": 0},
    }
    values["data"]["cache"] = folder / "cache"
    return parse_config(values | changes, "test")


def test_a_run_and_its_data_by_names_from_outside(outside: None, mesh: Mesh, tmp_path: Path) -> None:
    cfg = config(tmp_path)
    train(cfg, mesh)
    pools = [json.loads(line) for line in (tmp_path / "run" / "pools.jsonl").read_text().splitlines()]
    assert len(pools) == 4
    for pool in pools:
        original, rewrite = (candidate["text"] for candidate in pool["candidates"])
        assert rewrite and rewrite == rewrite.upper() != original
        better = rewrite.count("A") > original.count("A")
        assert (pool["chosen"], pool["rejected"]) == ((1, 0) if better else (None, None))
    JudgePairs(pairs=5, safety=0, held_out=4).make(cfg, tmp_path / "made")
    rows = [json.loads(line) for line in (tmp_path / "made" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and {row["corruption"] for row in rows} == {"shout"}
    with pytest.raises(ConfigError, match="must be one letter"):
        train(config(tmp_path / "other", judge={"backend": "letters", "options": {"letter": "AB"}}), mesh)


@pytest.mark.parametrize("section", ["judge", "rewriter", "corruptor"])
def test_unknown_names_are_refused_with_those_there_are(tmp_path: Path, section: str) -> None:
    known = {
        "judge": "heuristic, world, server, local",
        "rewriter": "none, world",
        "corruptor": "rules, edits, world",
    }
    with pytest.raises(
        ConfigError, match=rf"{section}.backend: unknown {section} 'nobody'; known: {known[section]}"
    ):
        parse_config({section: {"backend": "nobody"}}, "test")


def test_options_are_for_those_from_outside(outside: None) -> None:
    with pytest.raises(ConfigError, match=r'judge.options is set, but judge.backend = "heuristic" has none'):
        parse_config({"judge": {"options": {"letter": "A"}}}, "test")
    assert parse_config({"judge": {"backend": "letters", "options": {"x": 1}}}, "test").judge.options == {
        "x": 1
    }


def test_a_judge_of_an_installed_package_is_found_by_its_entry_point(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kind_judge.py").write_text(
        "from sip_engine.types import Score\n"
        "class Kind:\n"
        "    name = 'kind'\n"
        "    def judge(self, questions, *, seed=0):\n"
        "        return [Score(0.75, (0.75,)) for _ in questions]\n"
        "def opener(cfg, corpus, mesh):\n"
        "    return Kind()\n"
    )
    info = tmp_path / "kind_judge-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kind-judge\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sip_engine.judges]\nkind = kind_judge:opener\n")
    with pytest.raises(ConfigError, match="unknown judge 'kind'"):
        parse_config({"judge": {"backend": "kind"}}, "test")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = parse_config({"judge": {"backend": "kind"}}, "test")
    corpus: Any = None
    (found,) = open_judge(cfg, corpus, mesh).judge([PairQuestion("a", "b", "c")])
    assert isinstance(found, Score) and found.value == 0.75
    JUDGES.forget("kind")


def test_a_config_with_every_backend_is_read_without_torch() -> None:
    """What the names stand for is imported when it is opened, not when a config is checked."""
    code = (
        "import sys\nfrom sip_engine.config.parse import parse_config\nfrom sip_engine.cli import app\n"
        "for name in ('heuristic', 'world'):\n"
        "    parse_config({'world': {}, 'judge': {'backend': name}, 'rewriter': {'backend': 'world'}}, 'test')\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
