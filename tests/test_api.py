"""The front door in Python: names loaded late, texts sampled and scored as by the engine, one step that teaches."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from world_runs import run_config

import sip_engine
from sip_engine import Request, RequestError, SamplingParams, Trainer, load_policy
from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.rows import Row
from sip_engine.sampler.files import generate_file, score_file
from sip_engine.train import train

ROOT = Path(__file__).parents[1]
HEADING = "## Python in ten lines\n"


@pytest.fixture(scope="module")
def run(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(run_config(folder, steps=2), mesh)
    return folder / "run"


def ten_lines() -> str:
    """The first python block below the heading, in README or, while it is not there, in CONTRIBUTING."""
    for name in ("README.md", "CONTRIBUTING.md"):
        _, heading, rest = (ROOT / name).read_text(encoding="utf-8").partition(HEADING)
        if heading:
            found = re.search(r"```python\n(.*?)```", rest, re.DOTALL)
            assert found is not None, f"{name}: no python block below {HEADING}"
            return found[1]
    raise AssertionError(f"no document has the heading {HEADING}")


def test_the_ten_lines_of_the_documents_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "runs" / "quickstart" / "base")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(ten_lines(), "ten lines", "exec"), names)
    printed = re.fullmatch(r"loss (\S+), better (\S+), worse (\S+)\n", capsys.readouterr().out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(math.log(2), abs=1e-3)  # policy and reference are equal yet
    assert len(names["drafts"]) == 4
    assert textwrap.indent(ten_lines(), "    ") in textwrap.indent(inspect.getdoc(sip_engine) or "", "")


def test_texts_are_continued_and_scored_as_by_the_commands(run: Path, tmp_path: Path) -> None:
    policy, prompts = load_policy(run), ["The", "A man of"]
    greedy = SamplingParams(max_new_tokens=8, greedy=True)
    asked, pairs = tmp_path / "p.jsonl", [("The", " old bridge"), ("A man of", " the river.")]
    asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    generate_file(run, asked, tmp_path / "g.jsonl", n=1, params=greedy, kv_memory_mb=16)
    asked.write_text("".join(json.dumps({"prefix": p, "suffix": s}) + "\n" for p, s in pairs))
    score_file(run, asked, tmp_path / "s.jsonl")
    expected, scored = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("g.jsonl", "s.jsonl")
    )
    for (found,), row in zip(policy.generate(prompts, greedy), expected, strict=True):
        (same,) = row["completions"]
        assert (found.text, found.ids.tolist()) == (same["text"], same["ids"])
        np.testing.assert_allclose(found.logprobs, same["logprobs"], atol=1e-5)
    np.testing.assert_allclose(policy.score(pairs), [row["logprob"] for row in scored], atol=1e-5)

    drawn = [policy.generate(prompts, SamplingParams(8, seed=seed), n=3) for seed in (3, 3, 4)]
    texts = [[c.text for group in groups for c in group] for groups in drawn]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1


def test_a_step_teaches_and_what_is_sampled_next_is_the_new_policy(run: Path) -> None:
    policy = load_policy(run)
    pairs = [("The", " old bridge"), ("The", " green stone")]
    before = policy.score(pairs)
    trainer = Trainer(policy, lr=1e-3, beta=0.5)
    np.testing.assert_allclose(policy.score(pairs), before, atol=1e-5)  # it took the weights over
    losses = [trainer.step([("The", " old bridge", " green stone")]).loss for _ in range(3)]
    after = policy.score(pairs)
    gain = (after - before)[0] - (after - before)[1]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[0] > losses[1] > losses[2]
    # The reference stayed: the loss of the next step, by hand from scores in float64 (arXiv 2305.18290, eq. 7).
    step = trainer.step([("The", " old bridge", " green stone")])
    assert step.loss == pytest.approx(math.log1p(math.exp(-0.5 * gain)), abs=1e-4)
    prefix, _ = policy.encode("The", "x")
    (draft,) = policy.sampler.generate([Request(prefix, 1)], SamplingParams(max_new_tokens=8, greedy=True))[0]
    (found,) = trainer.policy._frozen.score_rows([Row(prefix, (draft.ids,))])[0]
    np.testing.assert_allclose(found.logprobs, draft.logprobs, atol=1e-3)


def test_what_cannot_be_asked_is_one_line(run: Path) -> None:
    policy = load_policy(run)
    with pytest.raises(RequestError, match="pair 1: the continuation is empty"):
        policy.score([("a", "b"), ("a", "")])
    with pytest.raises(RequestError, match=r"pair 0: .* exceed the model's context of"):
        policy.score([("a", "b c d e f g " * 200)])
    with pytest.raises(RequestError, match="at least one"):
        Trainer(policy).step([])
    with pytest.raises(sip_engine.SipError, match="no checkpoint here"):
        load_policy(run / "nowhere")


def test_the_package_loads_nothing_before_a_name_is_used() -> None:
    code = (
        "import sys, sip_engine; heavy = {'torch', 'numpy', 'pydantic'} & set(sys.modules); assert not heavy, heavy; "
        "assert 'load_policy' in dir(sip_engine); import sip_engine.train; from sip_engine import train; "
        "assert train is sys.modules['sip_engine.train'].train and callable(train)"
    )
    done = subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_known_to_type_checkers_and_say_what_they_are() -> None:
    tree = ast.parse(Path(inspect.getfile(sip_engine)).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    shown = {alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert shown == set(sip_engine.__all__) == set(sip_engine._PLACES)
    for name in sip_engine.__all__:
        assert len(inspect.getdoc(getattr(sip_engine, name)) or "") > 20, name
    with pytest.raises(AttributeError, match="nosuch"):
        _ = sip_engine.nosuch
