"""The table of predictions in configs/README.md: one plan a config, on the GPUs that its comment `# plan:` names."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from benchmarks.record import ROOT
from sip_engine.accounting.hardware import load_hardware, load_judge
from sip_engine.config.overrides import read_run_config
from sip_engine.planning.plan import Plan, Request, make_plan
from sip_engine.utils.files import write_atomic

README = ROOT / "configs" / "README.md"
BEGIN, END = "<!-- predictions: python -m benchmarks plan_table -->", "<!-- end of predictions -->"
HEAD = (
    "| config | GPUs, and the judge's | memory of a GPU, GiB of 79.6 | largest wave | step, s | of it the judge, s "
    "| tokens/s | MFU | the whole run, days | beside standard pretraining |\n" + "| --- " * 10 + "|"
)


def planned_configs() -> list[Path]:
    """Configs that say which GPUs they are planned for, under the repository's root."""
    found = sorted((ROOT / "configs").glob("*/*.toml"))
    return [path.relative_to(ROOT) for path in found if plan_options(path) is not None]


def plan_options(path: Path) -> argparse.Namespace | None:
    """What the comment `# plan: --nodes N [--judge SIZE --judge-gpus N]` of a config says."""
    lines = [
        line.removeprefix("# plan:") for line in path.read_text().splitlines() if line.startswith("# plan:")
    ]
    if not lines:
        return None
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--judge")
    parser.add_argument("--judge-gpus", type=int, default=0)
    return parser.parse_args(shlex.split(lines[0]))


def plan_config(path: Path) -> Plan:
    """The plan of a config on H100s, by the table of rates in the tree."""
    options = plan_options(ROOT / path)
    assert options is not None, path
    hardware = load_hardware("h100", measured=Path("none"))
    judge = load_judge(options.judge) if options.judge else None
    request = Request(hardware, options.nodes, judge=judge, judge_gpus=options.judge_gpus)
    return make_plan(read_run_config(ROOT / path, []), request)


def row(path: Path, plan: Plan) -> str:
    """One line of the table."""
    judge = sum(phase.seconds for phase in plan.phases if phase.name == "judge")
    cells = (
        f"[{path.relative_to('configs')}]({path.relative_to('configs')})",
        f"{plan.gpus}" + (f" + {plan.judge_gpus}" if plan.judge_gpus else ""),
        f"{plan.memory.total / 2**30:.0f}",
        f"{plan.largest_wave:,}" if plan.largest_wave else "–",
        f"{plan.seconds:.2g}" if plan.seconds < 1 else f"{plan.seconds:.1f}",
        f"{judge:.1f}" if judge else "–",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.mfu:.1%}",
        f"{plan.total_days:.2f}",
        f"{plan.seconds / plan.standard.seconds:.1f} x",
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """All lines."""
    return "\n".join([HEAD, *(row(path, plan_config(path)) for path in planned_configs())])


def main(argv: list[str]) -> int:
    """Write the table into configs/README.md."""
    argparse.ArgumentParser(prog="python -m benchmarks plan_table", description=__doc__).parse_args(argv)
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    write_atomic(README, f"{before}{BEGIN}\n{table()}\n{END}{after}")
    print(table())
    return 0
