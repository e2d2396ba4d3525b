"""Seconds of each phase from its work and a GPU's rates: the slowest of operations, bytes, links and host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sip_engine.accounting import work as works
from sip_engine.accounting.hardware import Hardware, JudgeModel
from sip_engine.accounting.memory import Wave, num_micro_batches, sampler_fp8_layers
from sip_engine.accounting.shape import Shape
from sip_engine.accounting.work import Collective, Work
from sip_engine.accounting.workload import Judging, Workload
from sip_engine.config.schema import RunConfig


@dataclass(frozen=True)
class Phase:
    """Predicted seconds of a phase in a step, what bounds it, and the work of one process."""

    name: str
    seconds: float
    bound: str
    """operations, bytes, links, host, storage, or judge's server."""
    flops: float = 0.0
    bytes: float = 0.0
    wire_bytes: float = 0.0


def phase_of(
    work: Work, hardware: Hardware, *, launches_per_layer: float, graph: bool = False, fp8: bool = False
) -> Phase:
    """Each piece takes the longer of its operations and bytes; collectives come after, launches go on meanwhile."""
    operations = moved = device = 0.0
    for piece in work.pieces:
        rate = hardware.gemm(
            getattr(hardware.shares, piece.flops_share),
            fp8=fp8 and piece.may_be_fp8 and hardware.gpu.gemm_fp8_tflop_s > 0,
        )
        by_flops = piece.flops / rate
        by_bytes = piece.bytes / hardware.copy(getattr(hardware.shares, piece.bytes_share))
        device += max(by_flops, by_bytes)
        if by_flops >= by_bytes:
            operations += by_flops
        else:
            moved += by_bytes
    links = sum(collective_seconds(call, hardware) for call in work.collectives)
    copies = work.host_bytes / (hardware.gpu.host_gb_s * 1e9 * hardware.shares.host)
    overheads = hardware.overheads
    launch = (overheads.graph_launch_us if graph else overheads.eager_launch_us) * 1e-6
    launches = work.layer_passes * launches_per_layer * launch
    parts = {
        "operations": operations,
        "bytes": moved,
        "links": links,
        "host": copies + max(0.0, launches - device),
    }
    seconds = max(device, launches) + links + copies
    bound = max(parts, key=lambda name: parts[name]) if seconds else "nothing"
    wire = sum(call.on_the_wire for call in work.collectives)
    return Phase(work.phase, seconds, bound, work.flops, work.bytes, wire)


def collective_seconds(call: Collective, hardware: Hardware) -> float:
    """A ring over the slowest link between neighbours, and the start of every call.

    A group that spans nodes sends through every GPU's own network card at once, where it holds one GPU a node or
    whole nodes alike.
    """
    span = call.group * call.stride
    return call.on_the_wire / hardware.link(span) + call.calls * hardware.overheads.collective_us * 1e-6


def step_phases(
    cfg: RunConfig,
    shape: Shape,
    load: Workload,
    wave: Wave,
    hardware: Hardware,
    replicas: int,
    judge: Phase,
) -> list[Phase]:
    """All phases of a step in their order. Those that hold nothing are left out."""
    overheads = hardware.overheads
    decode_launches, train_launches = overheads.decode_launches_per_layer, overheads.train_launches_per_layer
    bubble = _bubble(cfg, load)
    phases: list[Phase] = []
    if load.rollouts and wave.waves:
        phases += _generation(shape, load, wave, hardware, decode_launches, cfg)
    phases.append(judge)
    fp8 = cfg.model.precision == "fp8"
    reference = works.reference(cfg, shape, load)
    phases.append(
        _longer(phase_of(reference, hardware, launches_per_layer=train_launches / 3, fp8=fp8), bubble)
    )
    update = works.update(cfg, shape, load)
    phases.append(_longer(phase_of(update, hardware, launches_per_layer=train_launches / 3, fp8=fp8), bubble))
    phases.append(phase_of(works.optimizer(cfg, shape, replicas), hardware, launches_per_layer=0))
    communication = phase_of(works.communication(cfg, shape, replicas), hardware, launches_per_layer=0)
    if cfg.parallel.overlap:
        # Gradients are reduced under the backward pass, two thirds of an update: what is longer shows.
        hidden = min(communication.seconds, phases[-2].seconds * 2 / 3)
        communication = _replace_seconds(communication, communication.seconds - hidden)
    phases += [communication, save_phase(cfg, shape, hardware, replicas)]
    return [phase for phase in phases if phase.seconds > 0]


def _generation(
    shape: Shape, load: Workload, wave: Wave, hardware: Hardware, launches: float, cfg: RunConfig
) -> Iterable[Phase]:
    """Prefill and decode of all waves; with pipeline stages as many are under way, and one idles only at the ends."""
    stages = cfg.parallel.pipeline
    quantised = sampler_fp8_layers(cfg, shape)
    prefill = works.prefill(shape, load.prefixes / wave.waves, load.prefix, fp8_layers=quantised)
    one = works.decode(
        shape,
        load.sequences / wave.waves,
        load.rollouts,
        load.prefix,
        load.suffix,
        cfg.sampler.kv_dtype,
        fp8_layers=quantised,
    )
    # A step of a stage needs the other stages' in between: that many part waves of a share each fill the time.
    fill = (load.suffix + stages - 1) / load.suffix
    first = phase_of(prefill, hardware, launches_per_layer=launches)
    then = phase_of(one, hardware, launches_per_layer=launches, graph=True)
    yield _longer(_replace_seconds(first, first.seconds + hardware.overheads.wave_s), wave.waves)
    yield _longer(then, wave.waves * fill)


def server_judge(
    asked: Judging,
    load: Workload,
    replicas: int,
    judge: JudgeModel,
    gpus: int,
    hardware: Hardware,
    concurrency: int,
) -> Phase:
    """All replicas' questions, answered on `gpus` GPUs of the same kind by copies of one model.

    A server reads a prefix once for its questions; decoding takes as many requests at once as the replicas send, up
    to 256 a copy.
    """
    copies = gpus // judge.gpus
    prefixes = load.prefixes * replicas
    read = prefixes * asked.read * 2 * judge.parameters
    read_s = read / (gpus * hardware.gemm(hardware.shares.judge_prefill))
    written = prefixes * asked.written
    batch = max(1.0, min(256.0, concurrency * replicas / copies, prefixes * max(asked.calls, 1) / copies))
    context = load.prefix + 2 * load.suffix
    step_bytes = (2 * judge.parameters + batch * context * judge.kv_bytes_per_token) / judge.gpus
    step_s = max(
        step_bytes / hardware.copy(hardware.shares.judge_decode),
        batch * 2 * judge.parameters / (judge.gpus * hardware.gemm(hardware.shares.judge_prefill)),
    )
    written_s = written / (copies * batch) * step_s
    bound = "operations" if read_s > written_s else "bytes"
    return Phase("judge", read_s + written_s, f"judge's {bound}", read + written * 2 * judge.parameters)


def waiting(judge: Phase, generation: float, chunks: int) -> Phase:
    """What the loop waits for: all but the last of `chunks` are judged while the next one is generated."""
    hidden = min(judge.seconds, generation) * (chunks - 1) / chunks
    return _replace_seconds(judge, judge.seconds - hidden)


def save_phase(cfg: RunConfig, shape: Shape, hardware: Hardware, replicas: int) -> Phase:
    """A checkpoint's share of a step: written by all nodes at once, each as fast as its storage."""
    if not cfg.checkpoint.every:
        return Phase("save", 0.0, "storage")
    gpus = replicas * cfg.parallel.tensor * cfg.parallel.pipeline
    nodes = -(-gpus // hardware.gpu.gpus_per_node)
    size = works.checkpoint_bytes(cfg, shape)
    seconds = size / (nodes * hardware.overheads.storage_gb_s * 1e9)
    return Phase("save", seconds / cfg.checkpoint.every, "storage", bytes=size / gpus)


def _bubble(cfg: RunConfig, load: Workload) -> float:
    """How much longer a pipeline takes than its busiest stage works: (m + p - 1) / m for m micro-batches."""
    micro = num_micro_batches(cfg, load)
    return (micro + cfg.parallel.pipeline - 1) / micro


def _longer(phase: Phase, factor: float) -> Phase:
    return _replace_seconds(phase, phase.seconds * factor)


def _replace_seconds(phase: Phase, seconds: float) -> Phase:
    return Phase(phase.name, seconds, phase.bound, phase.flops, phase.bytes, phase.wire_bytes)
