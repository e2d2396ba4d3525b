"""Operations and bytes of a step, phase by phase, on one process: what the definitions ask for, before any rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sip_engine.accounting.memory import num_micro_batches
from sip_engine.accounting.shape import Shape, causal_pairs, row_pairs
from sip_engine.accounting.workload import Workload
from sip_engine.config.schema import RunConfig


@dataclass(frozen=True)
class Piece:
    """Work whose operations and bytes go on at the same time; `flops_share` and `bytes_share` name their rates."""

    flops: float = 0.0
    flops_share: str = "gemm"
    bytes: float = 0.0
    bytes_share: str = "decode_weights"
    may_be_fp8: bool = False


@dataclass(frozen=True)
class Collective:
    """Calls over `group` neighbouring processes: bytes that each one puts in, all calls together."""

    kind: str
    """all_reduce, reduce_scatter, all_gather (bytes of the whole) or send."""
    group: int
    bytes: float
    calls: float
    stride: int = 1
    """Ranks between neighbours of the group: 1 for tensor parallelism."""

    @property
    def on_the_wire(self) -> float:
        """Bytes that each process sends in a ring."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all_reduce": 2 * share, "send": 1.0}.get(self.kind, share)


@dataclass(frozen=True)
class Work:
    """One phase on one process."""

    phase: str
    pieces: tuple[Piece, ...] = ()
    collectives: tuple[Collective, ...] = ()
    layer_passes: float = 0.0
    """Layers run over a micro-batch, or one token of a wave, each with launches of its own."""
    host_bytes: float = 0.0
    """Copied between host and device."""

    @property
    def flops(self) -> float:
        return sum(piece.flops for piece in self.pieces)

    @property
    def bytes(self) -> float:
        return sum(piece.bytes for piece in self.pieces)

    def times(self, factor: float) -> Work:
        """The same phase, made `factor` times."""
        return replace(
            self,
            pieces=tuple(replace(p, flops=p.flops * factor, bytes=p.bytes * factor) for p in self.pieces),
            collectives=tuple(
                replace(c, bytes=c.bytes * factor, calls=c.calls * factor) for c in self.collectives
            ),
            layer_passes=self.layer_passes * factor,
            host_bytes=self.host_bytes * factor,
        )


def body_flops(shape: Shape, tokens: float) -> float:
    """Matrix products of this process's layers over `tokens`, one pass forward."""
    return 2.0 * shape.layers * shape.matrix_parameters * tokens


def attention_flops(shape: Shape, pairs: float) -> float:
    """Two products of 2 D operations a visible pair and head, one pass forward; the backward pass has five."""
    return 4.0 * shape.layers * shape.query_channels * pairs


def head_flops(shape: Shape, targets: float) -> float:
    """Logits of `targets`, once; forward and backward of the fused head make them four times over."""
    return 2.0 * shape.model.hidden_size * shape.vocab_size / shape.parallel.tensor * targets


def prefill(shape: Shape, prefixes: float, prefix: float, *, fp8_layers: float = 0.0) -> Work:
    """Each prefix read once, whatever number of rollouts follow it; the matrices of `fp8_layers` are in FP8."""
    tokens = prefixes * prefix
    pieces = (
        Piece(body_flops(shape, tokens), bytes=_weight_bytes(shape, fp8_layers)),
        Piece(attention_flops(shape, prefixes * causal_pairs(prefix)), "prefill_attention"),
    )
    return Work("prefill", pieces, tuple(_tensor_sums(shape, tokens, 1)), shape.layers)


def decode(
    shape: Shape,
    sequences: float,
    rollouts: int,
    prefix: float,
    suffix: int,
    kv_dtype: str,
    *,
    fp8_layers: float = 0.0,
) -> Work:
    """`suffix` tokens of each of `sequences`, decoded in step; the first is drawn from the prefill's hidden state.

    Keys and values of a prefix are read once for its `rollouts`; weights once a step, those of `fp8_layers` at a
    byte a parameter.
    """
    steps, seen = suffix - 1, causal_pairs(suffix - 1)
    token_bytes = shape.kv_bytes(kv_dtype)
    groups = sequences / max(rollouts, 1)
    weights = Piece(
        body_flops(shape, sequences * steps) + head_flops(shape, sequences * suffix),
        bytes=steps * _weight_bytes(shape, fp8_layers) + suffix * shape.vocab_parameters * shape.dtype_bytes,
    )
    attention = Piece(
        attention_flops(shape, sequences * (prefix * steps + seen)),
        "prefill_attention",
        decode_kv_bytes(token_bytes, groups, sequences, prefix, steps, seen),
        "decode_attention",
    )
    return Work(
        "decode", (weights, attention), tuple(_tensor_sums(shape, sequences, steps)), steps * shape.layers
    )


def decode_kv_bytes(
    token_bytes: float, groups: float, sequences: float, prefix: float, steps: float, seen: float
) -> float:
    """KV bytes read: a group's prefix once a step, a sequence's own `seen` tokens over all steps."""
    return token_bytes * (groups * prefix * steps + sequences * seen)


def update(cfg: RunConfig, shape: Shape, load: Workload) -> Work:
    """Forward and backward of all rows, with what is computed again, and the optimizer."""
    tokens, targets = load.prefixes * load.row, load.prefixes * load.scored
    pairs = load.prefixes * _pairs(load)
    body, attention = body_flops(shape, tokens), attention_flops(shape, pairs)
    again_body, again_attention, again_sums = _again(cfg, shape, tokens, body, attention)
    micro = num_micro_batches(cfg, load)
    pieces = (
        Piece(3 * body + again_body, bytes=3 * micro * _weight_bytes(shape), may_be_fp8=True),
        Piece(attention + again_attention, "train_attention_forward"),
        Piece(2.5 * attention, "train_attention_backward"),
        Piece(4 * head_flops(shape, targets), "log_prob_head"),
    )
    sums = tuple(_training_sums(cfg, shape, tokens, micro, again_sums))
    return Work("update", pieces, sums, 3.0 * micro * shape.layers)


def optimizer(cfg: RunConfig, shape: Shape, replicas: int) -> Work:
    """AdamW: gradient, master weight and both moments read, the last three and the parameter written."""
    parameters = shape.most_parameters / (replicas if cfg.parallel.distributed_optimizer else 1)
    touched = 4 + 2 * 12 + shape.dtype_bytes
    return Work("optimizer", (Piece(bytes=parameters * touched, bytes_share="optimizer"),))


def reference(cfg: RunConfig, shape: Shape, load: Workload) -> Work:
    """The reference policy's log-probs of the same rows, one pass forward; offloaded, its weights are copied up."""
    if not load.needs_reference:
        return Work("reference")
    tokens, targets = load.prefixes * load.row, load.prefixes * load.scored
    pieces = (
        Piece(body_flops(shape, tokens), bytes=num_micro_batches(cfg, load) * _weight_bytes(shape)),
        Piece(attention_flops(shape, load.prefixes * _pairs(load)), "train_attention_forward"),
        Piece(head_flops(shape, targets), "log_prob_head"),
    )
    micro = num_micro_batches(cfg, load)
    copied = shape.most_parameters * shape.dtype_bytes if cfg.reference.offload else 0.0
    return Work(
        "reference",
        pieces,
        tuple(_forward_sums(cfg, shape, tokens, micro)),
        micro * shape.layers,
        host_bytes=copied,
    )


def communication(cfg: RunConfig, shape: Shape, replicas: int) -> Work:
    """Gradients over the replicas once a step; the distributed optimizer scatters them and gathers parameters."""
    if replicas == 1:
        return Work("communication")
    parameters, stride = shape.most_parameters, cfg.parallel.tensor * cfg.parallel.pipeline
    gradients = parameters * (4 if cfg.parallel.grad_reduce == "fp32" else shape.dtype_bytes)
    if cfg.parallel.distributed_optimizer:
        calls = (
            Collective("reduce_scatter", replicas, gradients, 1, stride),
            Collective("all_gather", replicas, parameters * shape.dtype_bytes, 1, stride),
        )
    else:
        calls = (Collective("all_reduce", replicas, gradients, 1, stride),)
    return Work("communication", collectives=calls)


def checkpoint_bytes(cfg: RunConfig, shape: Shape) -> float:
    """Bytes of a checkpoint, all processes together: weights, optimizer, reference."""
    per_parameter = shape.dtype_bytes + (8 if shape.dtype_bytes == 4 else 12)
    per_parameter += shape.dtype_bytes if cfg.needs_reference else 0
    return shape.total_parameters * per_parameter


def _pairs(load: Workload) -> float:
    """Visible pairs of a mean row."""
    return row_pairs(load.prefix, load.suffix, load.trained)


def _again(
    cfg: RunConfig, shape: Shape, tokens: float, body: float, attention: float
) -> tuple[float, float, float]:
    """Operations of matrices and attention that are made again in the backward pass, and sums a layer."""
    if cfg.parallel.recompute == "full":
        return body, attention, 2.0
    if cfg.parallel.recompute == "mlp":
        swiglu = 2.0 * 3 * shape.model.hidden_size * shape.ffn_channels * tokens * shape.layers
        return swiglu, 0.0, 1.0
    return 0.0, 0.0, 0.0


def _weight_bytes(shape: Shape, fp8_layers: float = 0.0) -> float:
    """The matrices of this process's layers, read once."""
    return shape.matrix_parameters * (shape.dtype_bytes * (shape.layers - fp8_layers) + fp8_layers)


def _tensor_sums(shape: Shape, tokens: float, times: float) -> Iterator[Collective]:
    """The sampler's sums over the tensor shards: two a layer, and the embedding's."""
    tensor = shape.parallel.tensor
    if tensor > 1:
        calls = (2 * shape.layers + 1) * times
        yield Collective("all_reduce", tensor, calls * _hidden_bytes(shape, tokens), calls)


def _hidden_bytes(shape: Shape, tokens: float) -> float:
    return tokens * shape.model.hidden_size * shape.dtype_bytes


def _forward_sums(cfg: RunConfig, shape: Shape, tokens: float, micro: int) -> Iterator[Collective]:
    """One pass forward of Megatron's layers over all micro-batches, and what it sends between stages."""
    tensor, size = cfg.parallel.tensor, _hidden_bytes(shape, tokens)
    if tensor > 1 and not cfg.parallel.sequence:
        calls = 2 * shape.layers + 1
        yield Collective("all_reduce", tensor, calls * size, calls * micro)
    elif tensor > 1:
        calls = 2 * shape.layers + 1
        yield Collective("all_gather", tensor, calls * size, calls * micro)
        yield Collective("reduce_scatter", tensor, calls * size, calls * micro)
    if cfg.parallel.pipeline > 1:
        share = 1 / tensor if cfg.parallel.sequence else 1
        yield Collective("send", 2, share * size, micro, tensor)


def _training_sums(
    cfg: RunConfig, shape: Shape, tokens: float, micro: int, again: float
) -> Iterator[Collective]:
    """Forward and backward: as many sums in each; sequence parallelism gathers the inputs once more."""
    layers, size = shape.layers, _hidden_bytes(shape, tokens)
    for call in _forward_sums(cfg, shape, tokens, micro):
        if call.kind == "send":
            yield replace(call, bytes=2 * call.bytes, calls=2 * call.calls)
            continue
        extra = again * layers
        if call.kind == "all_gather":
            extra += 2 * layers
        calls = 2 * (2 * layers + 1) + extra
        yield replace(call, bytes=calls * size, calls=calls * micro)
