"""The plan of a reproduction: every stage and row is a valid run, names are checked, paths move with --out."""

from __future__ import annotations

from pathlib import Path

import pytest

from sip_engine.config.model import ModelConfig
from sip_engine.config.parse import changed_settings
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.experiments.reproduction.plan import (
    arm_config,
    arm_recipe,
    load_plan,
    scaled,
    stage_config,
    stage_recipe,
    truth_config,
)
from sip_engine.utils.errors import ConfigError
from sip_engine.world import World, write_documents

PLAN = Path(__file__).parents[2] / "configs" / "reproduction" / "small.toml"


@pytest.mark.parametrize("name", ["small", "large", "win_rate"])
def test_every_stage_and_row_of_a_shipped_plan_is_a_run(tmp_path: Path, name: str) -> None:
    plan = load_plan(PLAN.with_name(f"{name}.toml"))
    for stage in plan.stages:
        assert stage_config(plan, stage, PLAN.parent, tmp_path).out == tmp_path / stage.name
    for row in plan.rows:
        cfg = arm_config(plan, row, 2, tmp_path)
        assert (cfg.seed, cfg.out) == (2, tmp_path / "rows" / row.name / "seed_2")
        assert (cfg.init is None) == row.name.startswith("scratch")
        for path in (cfg.init, cfg.judge.local.checkpoint, cfg.rewriter.local.checkpoint, cfg.data.tokenizer):
            assert path is None or path.is_relative_to(tmp_path)
        assert truth_config(plan, cfg, plan.root)["judge"] == {"backend": "world"}
    names = {row.name for row in plan.rows}
    assert {f"quality_{n}" for n in (1, 2, 4, 8, 16)} | {"pivot_8", "tournament_8", "verdicts_8"} <= names
    runs = {row.name: arm_config(plan, row, 1, tmp_path) for row in plan.rows}
    by_truth = {row for row, cfg in runs.items() if cfg.needs_judge and cfg.judge.backend == "world"}
    tried = {row for row in runs if row.startswith("tried")}
    assert bool(tried) == (name == "win_rate")
    assert by_truth == {"truth_8", "truth_16"} | tried  # all others by the judge that is trained here


def test_another_kind_of_data_is_another_recipe(tmp_path: Path) -> None:
    """Though the two have no number of their own that differs."""
    (tmp_path / "base.toml").write_text('out = "runs/x/base"\n')
    kinds = (
        "judge_data = { pairs = 9, safety = 9, factuality = 9, held_out = 2 }",
        "notes_data = { num = 9, held_out = 2 }",
        "",
    )
    recipes = []
    for kind in kinds:
        plan = load_plan(
            written(tmp_path, SMALL.replace('config = "base.toml"', f'config = "base.toml"\n{kind}'))
        )
        recipes.append(stage_recipe(plan, plan.stages[0], tmp_path))
    for before in recipes:
        for now in recipes:
            assert bool(changed_settings(before, now)) == (before is not now)


def test_the_large_plan_is_large(tmp_path: Path) -> None:
    """As large everywhere, or what one stage makes does not fit into the next."""
    plan = load_plan(PLAN.with_name("large.toml"))
    stages = {stage.name: stage_config(plan, stage, PLAN.parent, tmp_path) for stage in plan.stages}
    runs = [arm_config(plan, row, 1, tmp_path) for row in plan.rows]
    (model,) = {cfg.model.model_dump_json() for cfg in (*stages.values(), *runs)}
    assert len({cfg.world.model_dump_json() for cfg in (*stages.values(), *runs) if cfg.world}) == 1
    layer = 2 * 768 * (768 + 4 * 64) + 3 * 768 * 2048
    assert ModelConfig.model_validate_json(model).num_layers * layer > 100_000_000
    of_documents = [*runs, *(stages[name] for name in ("base", "judge_data", "judge_rollouts", "notes"))]
    (data,) = {cfg.data.model_copy(update={"tokenizer": None}).model_dump_json() for cfg in of_documents}
    assert '"suffix_tokens":128' in data
    # A question holds a prefix and two suffixes, three for factuality, and room for the answer.
    context = stages["judge"].model.max_context
    assert context >= 256 + 3 * 128 + stages["judge"].data.suffix_tokens + 8
    assert all(stages[n].data.max_prefix_tokens + stages[n].data.suffix_tokens <= context for n in stages)
    assert all(cfg.rewriter.local.max_new_tokens > 128 for cfg in runs if cfg.needs_rewriter)
    spec, cut = stages["base"].world, stages["base"].data
    assert spec is not None
    texts = [
        one.text for one in write_documents(World(0, spec.num_people, spec.people_per_document), "train", 400)
    ]
    tokenizer = Tokenizer.train(texts, cut.vocab_size, tmp_path / "tokenizer.model")
    long_enough = sum(len(tokenizer.encode(text)) >= 2 * cut.suffix_tokens for text in texts)
    assert long_enough > 0.9 * len(texts)  # a chunk to go before, and one to be the suffix


def test_the_evaluation_is_checked_with_the_rows_and_moves_with_out(tmp_path: Path) -> None:
    text = SMALL.replace("[common]", "[evaluation.eval]\nnum_prefixs = 3\n[common]")
    plan = load_plan(written(tmp_path, text))
    with pytest.raises(ConfigError, match=r"evaluation of row one.*num_prefixs"):
        arm_recipe(plan, plan.rows[0], 1)
    plan = load_plan(PLAN)
    assert arm_recipe(plan, plan.rows[0], 1) != arm_recipe(plan, plan.rows[0], 2)
    assert arm_recipe(plan, plan.rows[0], 1)["evaluation"]["judge"]["backend"] == "world"


def test_a_short_plan_is_short(tmp_path: Path) -> None:
    plan, short = load_plan(PLAN), scaled(load_plan(PLAN), 0.1)
    row = arm_config(plan, plan.rows[1], 1, tmp_path)
    less = arm_config(short, short.rows[1], 1, tmp_path)
    assert (less.steps, less.optimizer.warmup_steps) == (row.steps // 10, row.optimizer.warmup_steps // 10)
    base = stage_config(short, short.stages[0], PLAN.parent, tmp_path)
    assert base.steps == stage_config(plan, plan.stages[0], PLAN.parent, tmp_path).steps // 10
    assert short.evaluation["eval"]["num_prefixes"] == plan.evaluation["eval"]["num_prefixes"] // 10
    (whole,), (data,) = ([s.judge_data for s in one.stages if s.judge_data] for one in (plan, short))
    assert data is not None and whole is not None and data.pairs == whole.pairs // 10
    for scale in (0.0, -1.0, 1.5):
        with pytest.raises(ConfigError, match="--scale"):
            scaled(plan, scale)


def test_a_plan_that_extends_another(tmp_path: Path) -> None:
    """Tables are merged, stages and rows by name; settings of everywhere replace those of a stage and of a row."""
    written(tmp_path, SMALL)
    (tmp_path / "base.toml").write_text(
        'out = "runs/x/base"\nsteps = 9\n[model]\nnum_layers = 2\nnum_heads = 2\n'
    )
    (tmp_path / "large.toml").write_text("""
extends = "plan.toml"
out = "runs/large"
[everywhere.model]
num_layers = 5
[[stages]]
name = "base"
set.steps = 7
[common]
steps = 3
[[rows]]
name = "one"
set.model = { num_layers = 1, hidden_size = 96 }
[[rows]]
name = "two"
label = "Two"
table = "main"
""")
    (tmp_path / "larger.toml").write_text('extends = "large.toml"\nseeds = [7]\n[common]\nsteps = 4\n')
    plan = load_plan(tmp_path / "larger.toml")
    assert (
        plan.root == Path("runs/x")
        and plan.seeds == (7,)
        and [row.name for row in plan.rows] == ["one", "two"]
    )
    assert [row.label for row in plan.rows] == ["One", "Two"]
    (stage,) = plan.stages
    base = stage_config(plan, stage, tmp_path, tmp_path / "out")
    assert (base.steps, base.model.num_layers, base.model.num_heads) == (7, 5, 2)
    one, two = (arm_config(plan, row, 7, tmp_path / "out") for row in plan.rows)
    assert (one.steps, one.model.num_layers, one.model.hidden_size) == (4, 5, 96)
    assert (two.steps, two.model.num_layers) == (4, 5)
    assert one.init == tmp_path / "out" / "base"  # under the root that the extended plan names
    assert plan.out == Path("runs/large")


def test_what_a_plan_extends_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'extends = "{PLAN}"\nseeds = [5]\n')
    plan, shipped = load_plan(tmp_path / "mine.toml"), load_plan(PLAN)
    for one, other in zip(plan.stages, shipped.stages, strict=True):
        assert stage_recipe(plan, one, tmp_path) == stage_recipe(shipped, other, PLAN.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "more.toml"', "extends itself"),
        ("extends = 3", "must be the name of another file"),
        ('extends = ""', "must be the name of another file"),
        ('extends = "plan.toml"\neverywhere = { out = "x" }', "everywhere: 'out' is each job's own"),
        (
            'extends = "plan.toml"\n[[stages]]\nname = "base"\nnotes_data = { num = 9, held_out = 2, mix = "x" }',
            "stages.base mixes in 'x'",
        ),
        (
            'extends = "plan.toml"\n[[stages]]\nname = "base"\nnotes_data = { num = 9, held_out = 2 }\n'
            "rewrite_data = { num = 9, held_out = 2 }",
            "stages.base: base makes one thing, not notes_data and rewrite_data",
        ),
        ('extends = "none.toml"', "none.toml: no such"),
        ('extends = "plan.toml"\n[rows]\nname = "one"', "rows: must be tables in double brackets"),
        ('extends = "plan.toml"\n[[rows]]\nlabel = "x"', "rows: must be tables in double brackets"),
        ('extends = "plan.toml"\n[[rows]]\nname = "one"\n[[rows]]\nname = "one"', "'one' is named twice"),
        ('extends = "plan.toml"\n[[rows]]\nname = "on"\nlabel = "x"', "rows.on.table: Field required"),
    ],
)
def test_a_bad_extension_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    written(tmp_path, SMALL)
    (tmp_path / "more.toml").write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_plan(tmp_path / "more.toml")
    assert "\n" not in str(raised.value) and ".toml" in str(raised.value)


SMALL = """
root = "runs/x"
baseline = "base"
[[stages]]
name = "base"
config = "base.toml"
[common]
init = "runs/x/base"
[common.judge]
backend = "local"
local = { checkpoint = "runs/x/judge" }
[[tables]]
name = "main"
title = "Main"
figures = ["win_rate"]
[[rows]]
name = "one"
label = "One"
table = "main"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_settings_that_a_row_is_without(tmp_path: Path) -> None:
    path = written(
        tmp_path, SMALL + 'unset = ["init", "judge.local"]\nset = { judge = { backend = "heuristic" } }\n'
    )
    plan = load_plan(path)
    cfg = arm_config(plan, plan.rows[0], 1, tmp_path)
    assert cfg.init is None and cfg.judge.local.checkpoint is None
    plan = load_plan(written(tmp_path, SMALL + 'unset = ["init.made"]\n'))
    with pytest.raises(ConfigError, match="'init' is a setting without settings"):
        arm_config(plan, plan.rows[0], 1, tmp_path)
    plan = load_plan(written(tmp_path, SMALL + 'unset = ["judge.lokal"]\n'))
    with pytest.raises(ConfigError, match="no common setting 'lokal'"):
        arm_config(plan, plan.rows[0], 1, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('baseline = "base"', 'baseline = "bass"', "there is no stage 'bass'"),
        ('config = "base.toml"', 'config = "base.toml"\nneeds = ["judge"]', "needs 'judge'"),
        ('table = "main"', 'table = "mane"', "there is no table 'mane'"),
        ('name = "one"', 'name = "a/b"', "names a folder"),
        ('figures = ["win_rate"]', 'figures = ["winrate"]', "figures"),
        ('baseline = "base"', 'baseline = "base"\nseeds = []', "seeds: there are none"),
        ('baseline = "base"', 'baseline = "base"\nseeds = [1, 1]', "seeds: '1' is named twice"),
        ('baseline = "base"', 'baseline = "base"\nseeds = [-1]', "seeds"),
        ('name = "base"', 'name = "../base"', "names a folder"),
        ('label = "One"', 'label = "One"\npaper = { winrate = 1.0 }', "paper.winrate"),
        ('label = "One"', 'label = "One"\ncolour = 1', "colour"),
        (
            'label = "One"\ntable = "main"',
            'label = "One"\ntable = "main"\n[[rows]]\nname = "one"\nlabel = "x"\ntable = "main"',
            "'one' is named twice",
        ),
    ],
)
def test_a_bad_plan_is_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert SMALL.count(old) == 1
    with pytest.raises(ConfigError, match=message) as raised:
        load_plan(written(tmp_path, SMALL.replace(old, new)))
    assert "\n" not in str(raised.value) and "plan.toml" in str(raised.value)
