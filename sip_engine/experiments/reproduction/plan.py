"""A reproduction's plan: which stages are made once, and which rows of the paper's tables are run over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from sip_engine.config.parse import merge_settings, parse_config, read_toml
from sip_engine.config.schema import RunConfig, Section, Seed
from sip_engine.experiments.scale import check_scale, shortened
from sip_engine.tasks.specs import DataSpec, JudgePairs, Rewrites, RolloutPairs, SentenceLabels
from sip_engine.utils.errors import ConfigError

FigureName = Literal[
    "win_rate",
    "win_rate_safe",
    "coherence_win_rate",
    "factuality",
    "safety",
    "faultless",
    "heldout_loss_faultless",
    "relative_diversity",
]
SHIFTS = "shifts.json"
"""What a stage of `judge_shifts` writes."""
_LEAST = {"steps": 2, "optimizer": {"warmup_steps": 0}, "eval": {"num_prefixes": 8}}
_DATA = ("judge_data", "rollout_data", "notes_data", "rewrite_data", "judge_shifts")
"""Keys of a stage that makes data; each holds the spec of a command of `sip data`."""


def _is_a_folder(value: str) -> str:
    if not value.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"{value!r}: use letters, digits, dashes and underscores, it names a folder")
    return value


FolderName = Annotated[str, AfterValidator(_is_a_folder)]


def _of_the_world(value: Any) -> Any:
    """A plan's stages lie in the world: so does their corruptor, where they name none."""
    return {"corruptor": "world", **value} if isinstance(value, dict) else value


class JudgeShifts(DataSpec):
    """Ask a trained judge about pairs of other kinds than it was trained on; a stage of a reproduction."""

    command = "judge-shifts"
    reads = "Documents of the world as the judge's data have them."
    maker = "sip_engine.experiments.reproduction.shifts:measure_shifts"
    judge: Path
    """The stage whose judge is asked."""
    method: Literal["log_odds", "sentence_labels"] = "sentence_labels"
    """How it is asked (`judge.local.method`)."""
    pairs: int = Field(default=300, ge=2)
    """Most pairs of each kind, each in both orders."""

    def under(self, folder: Path) -> Self:
        return self.model_copy(update={"judge": folder / self.judge})


class Stage(Section):
    """Something all rows need: a model trained from a config, or data made with one."""

    name: FolderName
    """Folder of what is made, under the plan's `root`; letters, digits, dashes and underscores."""
    config: Path
    """A run's config; beside the plan, if it is relative."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings that differ from the config's."""
    needs: tuple[str, ...] = ()
    """Stages that must be there before."""
    judge_data: Annotated[JudgePairs, BeforeValidator(_of_the_world)] | None = None
    """Make prompts for a judge instead of training (`sip data judge-pairs`); its corruptor is the world's own."""
    rollout_data: RolloutPairs | None = None
    """Make prompts for a judge of the rollouts of `init` instead of training; `mix` names a stage."""
    notes_data: SentenceLabels | None = None
    """Make texts with a note on each sentence instead of training; `mix` names a stage."""
    rewrite_data: Rewrites | None = None
    """Make prompts for a rewriter instead of training."""
    judge_shifts: JudgeShifts | None = None
    """Ask a judge about what it was not trained on instead of training; `judge` names a stage."""

    @model_validator(mode="after")
    def _makes_one_thing(self) -> Stage:
        kinds = [kind for kind in _DATA if getattr(self, kind) is not None]
        if len(kinds) > 1:
            raise ValueError(f"{self.name} makes one thing, not {' and '.join(kinds)}: leave out all but one")
        return self

    @property
    def makes(self) -> str:
        """The kind of data it makes, or "model"."""
        return next((kind for kind in _DATA if getattr(self, kind) is not None), "model")

    @property
    def data(self) -> DataSpec | None:
        """What it makes instead of training."""
        return next((spec for kind in _DATA if (spec := getattr(self, kind)) is not None), None)


class Arm(Section):
    """One row of a table: settings over the common ones, and the paper's figures to stand beside."""

    name: FolderName
    """Folder of its runs, under `rows`; letters, digits, dashes and underscores."""
    label: str
    """As it is called in the table."""
    table: str
    """The table it is shown in; a row of several tables is run once and named in `also`."""
    also: tuple[str, ...] = ()
    """Further tables."""
    paper: dict[FigureName, float] = Field(default_factory=dict)
    """Figure -> the paper's, in percent; missing where the paper has none."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings that differ from the common ones."""
    unset: tuple[str, ...] = ()
    """Common settings that this row is without, such as `init` or `judge.local`."""


class Table(Section):
    """One of the paper's tables: its title and which figures its order is judged by."""

    name: str
    title: str
    figures: tuple[FigureName, ...]


class Target(Section):
    """A figure that a row should reach."""

    row: str
    """Name of the row."""
    figure: FigureName
    label: str
    """As it is called on the page."""
    at_least: float
    """In percent; where `relative`, of gain over the baseline's figure."""
    relative: bool = False


class Plan(Section):
    """All of a reproduction.

    A file may say `extends = "other.toml"`: it is that plan with what the file says in its place. Tables are merged
    setting by setting; of stages, rows and tables those of the same name are, and new ones come last.
    """

    root: Path
    """Folder that the configs write to and read from; `out` and `--out` put another one in its place."""
    out: Path | None = None
    """Folder to write to and read from; unset: `root`."""
    seeds: tuple[Seed, ...] = (1, 2, 3)
    """Seeds of every row."""
    baseline: str
    """Stage whose continuations all rows are compared with."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Settings of the final evaluation over the row's own: its judge is the world's truth."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Settings that all rows share."""
    everywhere: dict[str, Any] = Field(default_factory=dict)
    """Settings of all rows and all stages, in the place of their own: the one model that is trained everywhere."""
    stages: tuple[Stage, ...]
    tables: tuple[Table, ...]
    rows: tuple[Arm, ...]
    scale: float = 1.0
    """Share of all steps and data; a shortened reproduction is a smoke test."""
    targets: tuple[Target, ...] = ()
    """What the page says first: met or missed."""

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        names_of = {"stages": [s.name for s in self.stages], "rows": [r.name for r in self.rows]}
        for what, names in (names_of | {"seeds": list(map(str, self.seeds))}).items():
            if not names:
                raise ValueError(f"{what}: there are none; name one or more")
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{what}: {sorted(twice)[0]!r} is named twice; give each its own name")
        own = sorted({"out", "seed"} & self.everywhere.keys())
        if own:
            raise ValueError(f"everywhere: {own[0]!r} is each job's own; leave it out")
        known: set[str] = set()
        for stage in self.stages:
            mix = getattr(stage.data, "mix", None)
            if mix and str(mix) not in stage.needs:
                raise ValueError(f"stages.{stage.name} mixes in {str(mix)!r}: name it among the needs, too")
            asked = stage.judge_shifts and str(stage.judge_shifts.judge)
            if asked and asked not in stage.needs:
                raise ValueError(f"stages.{stage.name} asks {asked!r}: name it among the needs, too")
            missing = sorted(set(stage.needs) - known)
            if missing:
                raise ValueError(
                    f"stages.{stage.name} needs {missing[0]!r}, which no stage before it makes: add or move it"
                )
            known.add(stage.name)
        if self.baseline not in known:
            raise ValueError(f"baseline: there is no stage {self.baseline!r}; name one of {sorted(known)}")
        tables = {table.name for table in self.tables}
        for row in self.rows:
            unknown = sorted({row.table, *row.also} - tables)
            if unknown:
                raise ValueError(
                    f"rows.{row.name}: there is no table {unknown[0]!r}; name one of {sorted(tables)}"
                )
        for target in self.targets:
            if target.row not in {row.name for row in self.rows}:
                raise ValueError(f"targets: there is no row {target.row!r}, which {target.label!r} asks of")
        return self


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: the file, or one that it extends, is missing, is not TOML, or does not hold a plan.
    """
    values = read_toml(path, _merge_plans)
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(
            f"{_place(fault['loc'], values)}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise ConfigError(f"{path}: {faults}") from None


def _place(loc: Sequence[int | str], values: dict[str, Any]) -> str:
    """Where a fault is; stages, rows and tables by their names."""
    parts = list(loc)
    if len(parts) > 1 and isinstance(parts[1], int):
        entry = values[parts[0]][parts[1]] if isinstance(parts[0], str) else None
        parts[1] = (
            entry["name"] if isinstance(entry, dict) and isinstance(entry.get("name"), str) else parts[1]
        )
    return ".".join(map(str, parts))


def _merge_plans(before: dict[str, Any], values: dict[str, Any], other: Path, path: Path) -> dict[str, Any]:
    """A plan over the one it extends: stages, rows and tables of the same name are merged, new ones come last."""
    if isinstance(stages := before.get("stages"), list):
        before = {**before, "stages": [_placed(stage, other.resolve().parent) for stage in stages]}
    merged = merge_settings(before, values)
    for name in ("stages", "rows", "tables"):
        if name in before and name in values:
            merged[name] = _merged_by_name(before[name], values[name], f"{path}: {name}")
    return merged


def _placed(stage: Any, folder: Path) -> Any:
    """A stage whose config is found from anywhere."""
    config = stage.get("config") if isinstance(stage, dict) else None
    return {**stage, "config": str(folder / config)} if isinstance(config, str) else stage


def _merged_by_name(base: Any, over: Any, what: str) -> list[dict[str, Any]]:
    before, after = _by_name(base, what), _by_name(over, what)
    return list(
        (before | {name: merge_settings(before.get(name, {}), one) for name, one in after.items()}).values()
    )


def _by_name(entries: Any, what: str) -> dict[str, dict[str, Any]]:
    named: dict[str, dict[str, Any]] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(entries, list):
            raise ConfigError(f"{what}: must be tables in double brackets that each have a name")
        if name in named:
            raise ConfigError(f"{what}: {name!r} is named twice; give each its own name")
        named[name] = entry
    return named


def scaled(plan: Plan, scale: float) -> Plan:
    """The plan with steps, data and held-out prefixes shortened to a share of theirs: a smoke test.

    Raises:
        ConfigError: scale is not in (0, 1].
    """
    check_scale(scale)
    if scale == 1:
        return plan
    stages = tuple(
        stage.model_copy(update={stage.makes: stage.data.scaled(scale)}) if stage.data is not None else stage
        for stage in plan.stages
    )
    evaluation = shortened(plan.evaluation, scale, _LEAST)
    return plan.model_copy(update={"stages": stages, "scale": scale, "evaluation": evaluation})


def stage_recipe(plan: Plan, stage: Stage, beside: Path) -> dict[str, Any]:
    """All that decides what a stage makes, wherever it is made; JSON values."""
    data = stage.data
    settings = stage_config(plan, stage, beside, plan.root).model_dump(mode="json")
    return {
        "settings": settings,
        "makes": stage.makes,
        "data": None if data is None else data.model_dump(mode="json"),
    }


def arm_recipe(plan: Plan, row: Arm, seed: int) -> dict[str, Any]:
    """All that decides what comes of a run of a row, wherever it is made; JSON values. Raises ConfigError."""
    cfg = arm_config(plan, row, seed, plan.root)
    evaluation = parse_config(truth_config(plan, cfg, plan.root), f"evaluation of row {row.name}")
    return {
        "settings": cfg.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
        "baseline": plan.baseline,
    }


def stage_config(plan: Plan, stage: Stage, beside: Path, out: Path) -> RunConfig:
    """A stage's config with `out` in the place of the plan's root. Raises ConfigError."""
    path = beside / stage.config
    settings = merge_settings(merge_settings(read_toml(path), stage.set), plan.everywhere)
    values = shortened(_moved(settings, plan.root, out), plan.scale, _LEAST)
    source = f"{path} (stage {stage.name})" if stage.set or plan.everywhere else str(path)
    return parse_config({**values, "out": str(out / stage.name)}, source + _everywhere(plan))


def arm_config(plan: Plan, row: Arm, seed: int, out: Path) -> RunConfig:
    """The settings of one run of a row. Raises ConfigError."""
    common = _without(plan.common, row.unset)
    settings = merge_settings(merge_settings(common, row.set), plan.everywhere)
    values = shortened(_moved(settings, plan.root, out), plan.scale, _LEAST)
    return parse_config(
        {**values, "seed": seed, "out": str(run_folder(out, row, seed))},
        f"row {row.name}" + _everywhere(plan),
    )


def _everywhere(plan: Plan) -> str:
    return ", with the plan's `everywhere`" if plan.everywhere else ""


def truth_config(plan: Plan, cfg: RunConfig, out: Path) -> dict[str, Any]:
    """Settings of a run's final evaluation: the plan's sections in the place of the run's own."""
    return {**cfg.model_dump(mode="json"), **_moved(plan.evaluation, plan.root, out)}


def stages_of(plan: Plan, cfg: RunConfig, out: Path) -> list[Path]:
    """Folders of the stages that a run of a row reads from, and of the baseline's."""
    used = [cfg.init, cfg.data.tokenizer]
    used += [cfg.judge.local.checkpoint] if cfg.needs_judge else []
    used += [parse_config(truth_config(plan, cfg, out), "evaluation").judge.local.checkpoint]
    used += [cfg.rewriter.local.checkpoint] if cfg.needs_rewriter else []
    return [
        out / stage.name
        for stage in plan.stages
        if stage.name == plan.baseline
        or any(path is not None and path.is_relative_to(out / stage.name) for path in used)
    ]


def run_folder(out: Path, row: Arm, seed: int) -> Path:
    """Where a run of a row lies."""
    return out / "rows" / row.name / f"seed_{seed}"


def _without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Settings less those of dotted `names`. Raises ConfigError where there is no such setting."""
    for name in names:
        first, _, rest = name.partition(".")
        if first not in values:
            raise ConfigError(f"unset: there is no common setting {name!r}; name one of {', '.join(values)}")
        if rest and not isinstance(values[first], dict):
            raise ConfigError(f"unset: {first!r} is a setting without settings of its own, {name!r} is none")
        inner = {} if not rest else {first: _without(values[first], [rest])}
        values = {key: value for key, value in values.items() if key != first} | inner
    return values


def _moved(value: Any, root: Path, out: Path) -> Any:
    """Settings with paths under `root` put under `out`."""
    if isinstance(value, dict):
        return {name: _moved(inner, root, out) for name, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, root, out) for inner in value]
    if isinstance(value, str) and Path(value).is_relative_to(root):
        return str(out / Path(value).relative_to(root))
    return value
