"""The best layouts for a run on given GPUs, found by planning all that can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from sip_engine.accounting import memory as memories
from sip_engine.accounting.shape import Shape
from sip_engine.accounting.workload import workload_of
from sip_engine.config.schema import RunConfig
from sip_engine.planning.plan import DoesNotFitError, Plan, Request, check_request, make_plan

SIZES = (1, 2, 4, 8, 16)
MICRO_BATCHES = (4096, 8192, 16384, 32768)
SPARE = 0.97
"""Share of a GPU's memory that a proposed layout fills at most."""


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, and why it stands where it stands."""

    plan: Plan
    reason: str


def sweep(cfg: RunConfig, request: Request, *, best: int = 5) -> list[Proposal]:
    """Layouts that fit, the fastest step first and of equal ones the one that needs least memory.

    Of each tensor x pipeline size and type of KV pages the best one is proposed. KV pages and sequences are set to
    what the rest leaves, so that waves are as large as they can be.

    Raises:
        DoesNotFitError: no layout fits.
    """
    found: dict[tuple[object, ...], Plan] = {}
    for layout in layouts(cfg, request):
        filled = _filled(layout, request)
        if filled is None:
            continue
        plan = make_plan(filled, request)
        main = plan.layout["tensor"], plan.layout["pipeline"], plan.layout["kv_dtype"]
        if main not in found or _rank(plan) < _rank(found[main]):
            found[main] = plan
    if not found:
        raise DoesNotFitError(
            f"no layout of {request.gpus} x {request.hardware.name} holds this run: use more GPUs, shorter prefixes "
            "or a smaller model"
        )
    plans = sorted(found.values(), key=_rank)[:best]
    return [Proposal(plan, _reason(plan, plans[0])) for plan in plans]


def layouts(cfg: RunConfig, request: Request) -> Iterator[RunConfig]:
    """Every layout that the model's sizes and the GPUs allow; tensor shards stay within a node."""
    for tensor, pipeline in itertools.product(SIZES, SIZES):
        replicas = request.gpus // (tensor * pipeline)
        can_be = (
            all(getattr(cfg.model, name) % tensor == 0 for name in ("num_heads", "num_kv_heads", "ffn_size"))
            and cfg.model.num_layers % pipeline == 0
            and tensor <= request.hardware.gpu.gpus_per_node
            and replicas * tensor * pipeline == request.gpus
            and replicas <= cfg.batch_size
        )
        if not can_be:
            continue
        for recompute, micro, kv in itertools.product(
            ("none", "mlp", "full"), MICRO_BATCHES, ("auto", "fp8")
        ):
            parallel = {
                "tensor": tensor,
                "pipeline": pipeline,
                "sequence": tensor > 1,
                "recompute": recompute,
                "micro_batch_tokens": micro,
                "distributed_optimizer": replicas > 1,
            }
            yield cfg.model_copy(
                update={
                    "parallel": cfg.parallel.model_copy(update=parallel),
                    "sampler": cfg.sampler.model_copy(update={"kv_dtype": kv}),
                }
            )


def _filled(cfg: RunConfig, request: Request) -> RunConfig | None:
    """The layout with KV pages and sequences set to what its other parts leave; None where nothing is left."""
    replicas = check_request(cfg, request)
    none = cfg.model_copy(update={"sampler": cfg.sampler.model_copy(update={"kv_memory_mb": 0})})
    shape = Shape(cfg.model, cfg.parallel, request.vocab_size or cfg.data.vocab_size)
    load = workload_of(cfg, replicas, prefix=request.prefix)
    judge = request.local_judge_bytes(cfg)
    rest = memories.memory_of(none, shape, load, request.hardware, replicas, judge).total
    left = SPARE * request.hardware.memory - rest
    if left < 0:
        return None
    if not load.rollouts:
        return cfg
    group = memories.group_bytes(cfg, shape, load)
    groups = min(int(left // group), load.prefixes)
    if groups == 0:
        return None
    sampler = {"kv_memory_mb": -(-groups * group // 2**20), "max_sequences": groups * load.rollouts}
    return cfg.model_copy(update={"sampler": cfg.sampler.model_copy(update=sampler)})


def _rank(plan: Plan) -> tuple[float, float]:
    """Seconds, those of the policy's GPUs to three digits, then memory: a prediction is no finer than that."""
    judge = sum(phase.seconds for phase in plan.phases if phase.name == "judge")
    return judge + float(f"{plan.seconds - judge:.3g}"), plan.memory.total


def _reason(plan: Plan, best: Plan) -> str:
    longest = max(plan.phases, key=lambda phase: phase.seconds)
    where = f"{longest.name} is {longest.seconds / plan.seconds:.0%} of it, bound by {longest.bound}"
    if plan is best:
        return f"fastest: {where}"
    grown = {
        phase.name: phase.seconds - sum(p.seconds for p in best.phases if p.name == phase.name)
        for phase in plan.phases
    }
    name = max(grown, key=lambda n: grown[n])
    if grown[name] < 0.01 * best.seconds:
        return f"as fast, with {(plan.memory.total - best.memory.total) / 2**30:+.1f} GiB: {where}"
    return f"+{max(0.0, plan.seconds / best.seconds - 1):.0%}: {name} takes {grown[name]:.2f} s more; {where}"
