"""A plan: what a run will need of each GPU, how long a step takes, and what that costs beside standard pretraining.

Counts of bytes and operations are exact for the code (tests/planning holds them against counted runs); seconds are
predictions from a table of rates.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from sip_engine.accounting import memory as memories
from sip_engine.accounting import work
from sip_engine.accounting.hardware import Hardware, JudgeModel
from sip_engine.accounting.memory import Memory, Wave
from sip_engine.accounting.shape import Shape
from sip_engine.accounting.workload import Judging, Workload, judging_of, workload_of
from sip_engine.config.schema import ObjectiveConfig, RunConfig
from sip_engine.planning import timing
from sip_engine.planning.timing import Phase
from sip_engine.utils.errors import ConfigError, SipError


class DoesNotFitError(SipError):
    """A plan needs more memory than a GPU has; its own exit code lets a launch script stop before the queue."""

    exit_code = 9


@dataclass(frozen=True)
class Request:
    """What is asked: which GPUs, how many, and what stands in for numbers that the config does not hold."""

    hardware: Hardware
    nodes: int
    vocab_size: int | None = None
    prefix: float | None = None
    judge: JudgeModel | None = None
    """The model behind a server or in the engine; None where none is named: it then takes no time."""
    judge_gpus: int = 0
    """GPUs of a judge's own, beside the policy's."""
    price: float | None = None
    """Dollars for a GPU hour."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.hardware.gpu.gpus_per_node

    def local_judge_bytes(self, cfg: RunConfig) -> float:
        """Bytes a process that a judge inside the engine takes; ConfigError where its size was not said."""
        if cfg.judge.backend != "local" or cfg.task != "policy" or not cfg.needs_judge:
            return 0.0
        if self.judge is None:
            raise ConfigError(
                'judge.backend = "local": say --judge, the size of the model that stands beside the policy'
            )
        return self.judge.parameters * 2 / cfg.parallel.tensor + cfg.judge.local.kv_memory_mb * 2**20


@dataclass(frozen=True)
class Cost:
    """A step, predicted. Energy is the boards' power limit times the time: an upper bound."""

    seconds: float
    peak_gib: float
    kilojoules: float
    dollars: float | None


@dataclass(frozen=True)
class Plan:
    """Everything predicted of one layout on so many GPUs."""

    gpu: str
    gpus: int
    judge_gpus: int
    layout: dict[str, Any]
    memory: Memory
    capacity: float
    fits: bool
    advice: tuple[str, ...]
    largest_wave: int
    wave: Wave
    phases: tuple[Phase, ...]
    judge_calls: int
    judge_alone_s: float
    """Seconds of the judge's work, whether the loop waits for it or not."""
    tokens_per_second: float
    """Tokens written by the policy and tokens trained on, all GPUs together."""
    mfu: float
    step: Cost
    standard: Cost
    total_days: float
    total_dollars: float | None

    @property
    def seconds(self) -> float:
        return self.step.seconds

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values; `prediction` says what it is."""
        return {"prediction": True, "units": "bytes, seconds, operations", **asdict(self)}


def make_plan(cfg: RunConfig, request: Request) -> Plan:
    """Predict a step of `cfg` on the GPUs of `request`.

    Raises:
        ConfigError: numbers of GPUs, lengths or layouts that cannot be.
    """
    replicas = check_request(cfg, request)
    hardware = request.hardware
    shape = Shape(cfg.model, cfg.parallel, request.vocab_size or cfg.data.vocab_size)
    load = workload_of(cfg, replicas, prefix=request.prefix)
    asked = judging_of(cfg, load)
    memory = memories.memory_of(cfg, shape, load, hardware, replicas, request.local_judge_bytes(cfg))
    chunks = cfg.judge.num_waves if asked.calls else 1
    roomy = cfg.model_copy(update={"sampler": cfg.sampler.model_copy(update={"max_sequences": 2**31})})
    largest = memories.wave_of(roomy, shape, load, memory.kv_room(hardware.memory)).sequences
    wave = memories.wave_of(cfg, shape, load, memory.kv, chunks=chunks)
    if load.rollouts and not wave.waves:
        raise ConfigError(
            f"sampler: not one group of {load.rollouts} rollouts fits the wave (kv_memory_mb="
            f"{cfg.sampler.kv_memory_mb}, max_sequences={cfg.sampler.max_sequences}); it needs "
            f"{memories.group_bytes(cfg, shape, load) / 2**20:,.0f} MiB and {load.rollouts} sequences: raise them"
        )
    judge = _judge_phase(cfg, request, replicas, load, asked)
    phases = timing.step_phases(cfg, shape, load, wave, hardware, replicas, judge)
    if cfg.judge.backend == "server":
        generation = sum(p.seconds for p in phases if p.name in ("prefill", "decode"))
        phases = [timing.waiting(p, generation, chunks) if p.name == "judge" else p for p in phases]
    seconds = sum(phase.seconds for phase in phases)
    step = _cost(seconds, memory.total, request.gpus + request.judge_gpus, request)
    written = load.sequences * load.suffix
    tokens = replicas * (written + load.prefixes * load.row)
    useful = _useful_flops(cfg, shape, load) * replicas * cfg.parallel.tensor * cfg.parallel.pipeline
    fits = memory.total <= hardware.memory
    days = seconds * cfg.steps / 86400
    return Plan(
        gpu=hardware.name,
        gpus=request.gpus,
        judge_gpus=request.judge_gpus,
        layout=layout_of(cfg, replicas),
        memory=memory,
        capacity=hardware.memory,
        fits=fits,
        advice=() if fits else tuple(advise(cfg, memory, replicas, hardware.memory)),
        largest_wave=largest,
        wave=wave,
        phases=tuple(phases),
        judge_calls=asked.calls * load.prefixes * replicas,
        judge_alone_s=judge.seconds,
        tokens_per_second=tokens / seconds,
        mfu=useful / seconds / (request.gpus * hardware.gpu.peak_bf16_tflop_s * 1e12),
        step=step,
        standard=standard_cost(cfg, request, replicas),
        total_days=days,
        total_dollars=None if step.dollars is None else step.dollars * cfg.steps,
    )


def refuse(plan: Plan, what: str) -> NoReturn:
    """Raise DoesNotFitError for a plan that does not fit: by how much, and the first thing to change."""
    raise DoesNotFitError(
        f"{what}: needs {plan.memory.total / 2**30:.1f} GiB of a {plan.gpu}'s {plan.capacity / 2**30:.1f}; "
        f"first: {plan.advice[0]}"
    )


def check_request(cfg: RunConfig, request: Request) -> int:
    """Data-parallel replicas of the request; ConfigError for numbers that cannot be."""
    if request.nodes < 1:
        raise ConfigError(f"--nodes {request.nodes}: must be 1 or more")
    if request.price is not None and request.price <= 0:
        raise ConfigError(f"--price {request.price:g}: dollars for a GPU hour must be above 0")
    if request.judge_gpus < 0:
        raise ConfigError(f"--judge-gpus {request.judge_gpus}: must be 0 or more")
    if request.judge_gpus and request.judge is None:
        raise ConfigError("--judge-gpus needs --judge, the size of the model on them")
    if request.judge is not None and 0 < request.judge_gpus < request.judge.gpus:
        raise ConfigError(
            f"--judge-gpus {request.judge_gpus}: one copy of that judge needs {request.judge.gpus}; raise it"
        )
    if request.judge is not None and not request.judge_gpus and cfg.judge.backend == "server":
        raise ConfigError(
            'judge.backend = "server" and --judge: say --judge-gpus, how many GPUs it stands on'
        )
    if request.vocab_size is not None and request.vocab_size < 1:
        raise ConfigError(f"--vocab-size {request.vocab_size}: must be 1 or more")
    model_gpus = cfg.parallel.tensor * cfg.parallel.pipeline
    if request.gpus % model_gpus:
        raise ConfigError(
            f"{request.gpus} GPUs ({request.nodes} nodes of {request.hardware.gpu.gpus_per_node}) cannot hold "
            f"parallel.tensor={cfg.parallel.tensor} x parallel.pipeline={cfg.parallel.pipeline}: use a multiple of "
            f"{model_gpus}"
        )
    if cfg.model.precision == "fp8" and not request.hardware.gpu.gemm_fp8_tflop_s:
        raise ConfigError(f'--gpu {request.hardware.name} has no FP8: set model.precision="bf16"')
    return request.gpus // model_gpus


def layout_of(cfg: RunConfig, replicas: int) -> dict[str, Any]:
    """The settings that a sweep changes, and the data-parallel replicas that follow."""
    parallel = cfg.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": replicas,
        "sequence": parallel.sequence,
        "distributed_optimizer": parallel.distributed_optimizer,
        "recompute": parallel.recompute,
        "micro_batch_tokens": parallel.micro_batch_tokens,
        "kv_dtype": cfg.sampler.kv_dtype,
        "kv_memory_mb": cfg.sampler.kv_memory_mb,
        "max_sequences": cfg.sampler.max_sequences,
    }


def standard_cost(cfg: RunConfig, request: Request, replicas: int) -> Cost:
    """A step of next-token training on the same documents with the same layout: no rollouts, judge or reference."""
    plain = cfg.model_copy(
        update={"objective": ObjectiveConfig(kind="next_token", loss_on="all"), "task": "policy"}
    )
    hardware = request.hardware
    shape = Shape(cfg.model, cfg.parallel, request.vocab_size or cfg.data.vocab_size)
    load = workload_of(plain, replicas, prefix=request.prefix)
    memory = memories.memory_of(plain, shape, load, hardware, replicas, 0.0)
    wave = Wave(0, 0, 0)
    phases = timing.step_phases(plain, shape, load, wave, hardware, replicas, Phase("judge", 0.0, "nothing"))
    return _cost(sum(p.seconds for p in phases), memory.total, request.gpus, request)


def advise(cfg: RunConfig, memory: Memory, replicas: int, capacity: float) -> list[str]:
    """What to change, each line one setting, the largest saving first."""
    parallel, found = cfg.parallel, []

    def add(saved: float, text: str) -> None:
        if saved > 0:
            found.append((saved, f"{text}: saves {saved / 2**30:.1f} GiB a GPU"))

    if replicas > 1 and not parallel.distributed_optimizer:
        add(memory.optimizer * (1 - 1 / replicas), "parallel.distributed_optimizer = true")
    if parallel.recompute != "full":
        add(memory.activations * 0.7, 'parallel.recompute = "full" (about)')
    if parallel.micro_batch_tokens > cfg.data.max_prefix_tokens + 2 * cfg.data.suffix_tokens:
        add(
            memory.activations / 2,
            f"parallel.micro_batch_tokens = {parallel.micro_batch_tokens // 2} (about)",
        )
    if cfg.sampler.kv_dtype == "auto":
        add(memory.kv / 2, 'half of sampler.kv_memory_mb, with sampler.kv_dtype = "fp8" for as many tokens')
    if not cfg.reference.offload:
        add(
            0.0 if not memory.reference else memory.reference / 2,
            "reference.offload = true (while nothing scores)",
        )
    if parallel.grad_reduce == "fp32" and cfg.model.precision != "fp32":
        add(memory.gradients / 2, 'parallel.grad_reduce = "parameters"')
    doubled = parallel.tensor * 2
    if all(getattr(cfg.model, n) % doubled == 0 for n in ("num_heads", "num_kv_heads", "ffn_size")):
        state = memory.weights + memory.gradients + memory.optimizer + memory.reference
        add(state / 2, f"parallel.tensor = {doubled}")
    return [text for _, text in sorted(found, reverse=True)] + [
        f"over by {(memory.total - capacity) / 2**30:.1f} GiB"
    ]


def _cost(seconds: float, peak: float, gpus: int, request: Request) -> Cost:
    hours = gpus * seconds / 3600
    return Cost(
        seconds=seconds,
        peak_gib=peak / 2**30,
        kilojoules=gpus * seconds * request.hardware.gpu.watts / 1e3,
        dollars=None if request.price is None else hours * request.price,
    )


def _judge_phase(cfg: RunConfig, request: Request, replicas: int, load: Workload, asked: Judging) -> Phase:
    """A judge behind a server on GPUs of its own, or inside the engine on the policy's; rules take no GPU time."""
    if not asked.calls or request.judge is None or cfg.judge.backend not in ("server", "local"):
        return Phase("judge", 0.0, "nothing")
    gpus = request.judge_gpus if cfg.judge.backend == "server" else request.gpus
    concurrency = (
        cfg.judge.server.concurrency if cfg.judge.backend == "server" else cfg.judge.local.max_sequences
    )
    return timing.server_judge(asked, load, replicas, request.judge, gpus, request.hardware, concurrency)


def _useful_flops(cfg: RunConfig, shape: Shape, load: Workload) -> float:
    """Model operations of a step on one process: what is computed again for memory's sake does not count."""
    once = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"recompute": "none"})})
    parts = [work.update(once, shape, load), work.reference(once, shape, load)]
    if load.rollouts:
        parts.append(work.prefill(shape, load.prefixes, load.prefix))
        parts.append(
            work.decode(shape, load.sequences, load.rollouts, load.prefix, load.suffix, cfg.sampler.kv_dtype)
        )
    return sum(part.flops for part in parts)
