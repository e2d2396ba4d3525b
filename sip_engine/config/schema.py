"""Every setting of a run, with its meaning; unknown keys and conflicts are refused with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sip_engine.config.backends import CORRUPTORS, JUDGES, REWRITERS
from sip_engine.config.data import DataConfig, WorldConfig
from sip_engine.config.judge import (
    CorruptorConfig,
    JudgeConfig,
    LocalModelConfig,
    RewriterConfig,
    ServerConfig,
)
from sip_engine.config.model import ModelConfig
from sip_engine.config.objective import LearnsFrom, ObjectiveConfig
from sip_engine.config.section import Decay, Positive, Section, Seed, Share
from sip_engine.config.tracking import TrackingConfig
from sip_engine.utils.registry import Registry


class CandidateStage(Section):
    """Which kinds of candidates enter the pool from a step on."""

    from_step: Annotated[int, Field(ge=0)] = 0
    """First step of this stage."""
    original: bool = True
    """The document's own suffix."""
    rewrite: bool = False
    """The rewriter's suffix; needs `rewriter.backend`."""
    rollouts: Annotated[int, Field(ge=0)] = 8
    """Number of the policy's own suffixes (method: 1 to 16)."""

    @property
    def num_candidates(self) -> int:
        """Candidates of a pool, if no rewrite fails."""
        return self.original + self.rewrite + self.rollouts


class SamplerConfig(Section):
    """How rollouts are sampled."""

    temperature: float = Field(default=1.0, ge=1e-6)
    """Divides the logits before drawing; 1 is the policy itself."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Keep the smallest set of tokens with this mass; 1 keeps all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    page_size: Positive = 16
    """Tokens a KV page holds."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """Type of the KV pages: auto is the weights', fp8 (e4m3, a scale a layer and head) holds twice as many tokens."""
    fp8_weights: Literal["auto", "off"] = "auto"
    """Where the policy computes in FP8 (model.precision), auto decodes from its matrices quantised by its own recipe,
    at a byte a parameter; sampled log-probs then lie nearer the trainer's. blockwise quantises activations alike,
    too; current leaves them as they are; delayed scales are not known here. off: from the 16-bit parameters."""
    cuda_graph: Literal["on", "off"] = "on"
    """Replay decode steps as CUDA graphs, captured once a shape; off launches every kernel anew. CUDA only."""
    batch_invariant: bool = False
    """The same bits for any batch, order and parallel layout, by exact sums in float64; many times slower."""
    max_sequences: Positive = 256
    """Most sequences decoded together; groups beyond it wait for the next wave."""
    kv_memory_mb: Positive | Literal["auto"] = 1024
    """Memory of the KV pages on each process, in MiB. auto: on CUDA four fifths of what is free when tokens are first
    drawn, given back while the policy is updated; on the CPU 1024."""
    prefill_tokens: Positive = 16384
    """Most prefix tokens in one forward pass of the sampler on CUDA, and with stop tokens; a longer prefix takes
    several."""

    @model_validator(mode="after")
    def _exact_pages(self) -> SamplerConfig:
        if self.batch_invariant and self.kv_dtype == "fp8":
            raise ValueError('batch_invariant needs kv_dtype="auto": FP8 scales depend on the batch')
        return self


class ReferenceConfig(Section):
    """The reference policy of DPO: frozen at the start unless told otherwise."""

    refresh_every: Annotated[int, Field(ge=0)] = 0
    """Updates after which it takes the policy's weights anew; 0 never."""
    ema: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Above 0 it follows the policy after every update: reference = ema * reference + (1 - ema) * policy."""
    offload: bool = False
    """Keep it in (pinned) CPU memory and bring it to the device for scoring only."""

    @model_validator(mode="after")
    def _one_rule(self) -> ReferenceConfig:
        if self.ema and self.refresh_every:
            raise ValueError(
                "ema and refresh_every are both set: choose how the reference follows the policy"
            )
        return self


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(default=5e-6, gt=0, le=1e30)
    """Peak learning rate."""
    min_lr_ratio: Share = 0.1
    """Final learning rate as a share of the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.95
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Global gradient norm is clipped to this; 0 does not clip."""


class ParallelConfig(Section):
    """How the model is laid over processes; what remains of the world is data parallel."""

    tensor: Positive = 1
    """Tensor-parallel size."""
    pipeline: Positive = 1
    """Pipeline-parallel size; the sampler works on as many waves at once."""
    sequence: bool = False
    """Sequence parallelism beside tensor parallelism."""
    distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel processes."""
    overlap: bool = False
    """Reduce gradients over the data-parallel processes while the backward pass still runs."""
    grad_reduce: Literal["fp32", "parameters"] = "fp32"
    """Type in which gradients add up over micro-batches and processes: fp32, or the parameters' own."""
    recompute: Literal["none", "mlp", "full"] = "none"
    """Activations computed again in the backward pass to save memory: none, SwiGLU blocks, or whole layers."""
    timeout_minutes: Positive = 120
    """How long a process waits for another before it gives up: tokenising on the first one, or a slow judge server,
    keeps the others waiting."""
    micro_batch_tokens: Positive = 16384
    """Most tokens in one forward pass; rows are packed into as few micro-batches as that allows, balanced by tokens.
    Their gradients accumulate."""


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints; 0 writes the last one only."""
    keep: Positive = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints whose step is a multiple of this stay as well; 0 keeps the newest only."""
    asynchronous: bool = False
    """Write while the training goes on, from one copy in the host's memory; a second save waits for the first."""


class EvalConfig(Section):
    """Evaluation inside training."""

    every: Annotated[int, Field(ge=0)] = 100
    """Steps between evaluations; 0 evaluates at the end only."""
    num_prefixes: Positive = 64
    """Held-out prefixes: for the next-token loss, and continued greedily and judged."""
    generate: bool = True
    """Continue and judge held-out prefixes, from before the first update on; off measures the loss only."""


class MonitorConfig(Section):
    """The known ways to fail that a run is watched for (method §failure signatures); shown in its report."""

    every: Annotated[int, Field(ge=0)] = 25
    """Steps between looks; 0 never looks."""
    action: Literal["warn", "stop"] = "warn"
    """What to do about a signature that is seen: say so once, or stop the run."""
    collapse: Share = 0.10
    """Collapse to safe but meaningless text: safety holds while coherence or the win rate has lost this much."""
    completeness: Share = 0.75
    """Favouring text that looks complete: it wins this share of its comparisons with cut-off text."""
    narrowing: Share = 0.40
    """Diversity falls: distinct 2-grams or entropy have lost this share while the reward rises."""
    unlearning: Share = 0.05
    """Chosen and rejected fall together: chosen has lost this share of its log-prob under the reference."""
    forgetting: float = Field(default=0.25, ge=0)
    """The policy forgets how documents go on: the held-out loss (on faultless documents where those are known) has
    risen by so many nats a token."""
    sameness: Share = 0.6
    """It says the same again: distinct 3-grams of greedy continuations have fallen below this share of those of
    faultless originals."""
    copying: Share = 0.10
    """It copies the prefix: rollouts hold this share more of tokens, four or more in a row, that stand in it than
    documents do."""
    drift: Share = 0.5
    """Sampler and trainer drift apart: the mean gap exceeds this share of max_drift."""


class FaultsConfig(Section):
    """What a run does about signals, and about processes that are gone, hang or are slow."""

    timeout_s: float = Field(default=1800.0, ge=0)
    """Seconds within which every process ends when one is gone or stopped, or none gets on; 0 waits for ever."""
    grace_s: float = Field(default=120.0, gt=0)
    """Seconds from a signal to the end of the process, saved or not: a little less than the scheduler gives."""
    slow_factor: float = Field(default=3.0, ge=0)
    """A process that takes this many times as long as the others, in two steps running, is named; 0 names none."""


def drift_limit(max_drift: float | str, precision: str, kv_dtype: str) -> float:
    """`max_drift` in nats. What auto stands for lies well above what each number format drifts by itself: about 0.006
    (bf16), 0.024 (FP8 pages) and 0.04 (FP8 trainer, fake-quantised) at 24 layers, scaled from 4 layers on a CPU.
    """
    if max_drift != "auto":
        return float(max_drift)
    return 0.15 if precision == "fp8" else 0.1 if kv_dtype == "fp8" else 0.05


class RunConfig(Section):
    """One run: from documents to a trained policy."""

    out: Path = Path("runs/default")
    """Folder of records and checkpoints."""
    task: Literal["policy", "judge", "rewriter"] = "policy"
    """What the model becomes. judge, rewriter: data.path and data.eval_path are files of prompts with known answers
    (`sip data judge-pairs`, `… notes`, `… rewrites`); train with next_token on the answers, then with grpo."""
    init: Path | None = None
    """Checkpoint to start the policy (and the reference policy) from; unset starts from scratch."""
    seed: Seed = 0
    """Seed of initial weights, data order and sampling."""
    steps: Annotated[int, Field(gt=0, lt=10**8)] = 1000
    """Updates."""
    batch_size: Positive = 256
    """Prefixes an update, over all processes."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    world: WorldConfig | None = None
    """Train on a synthetic world instead of files."""
    candidates: tuple[CandidateStage, ...] = (CandidateStage(),)
    """Stages in rising `from_step`; the last one that has begun holds."""
    sampler: SamplerConfig = SamplerConfig()
    judge: JudgeConfig = JudgeConfig()
    rewriter: RewriterConfig = RewriterConfig()
    corruptor: CorruptorConfig = CorruptorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reference: ReferenceConfig = ReferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    monitors: MonitorConfig = MonitorConfig()
    faults: FaultsConfig = FaultsConfig()
    tracking: TrackingConfig = TrackingConfig()
    max_drift: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """The run stops when sampler and trainer log-probs of rollouts differ by more than this on average, in nats; auto
    is 0.05, 0.1 with FP8 KV pages, and 0.15 where the trainer computes in FP8."""
    log_rollouts_every: Positive = 1
    """Steps between records of whole candidate pools."""

    @property
    def drift_limit(self) -> float:
        """`max_drift` in nats."""
        return drift_limit(self.max_drift, self.model.precision, self.sampler.kv_dtype)

    def candidates_at(self, step: int) -> CandidateStage:
        """The stage in force at a step."""
        return [stage for stage in self.candidates if stage.from_step <= step][-1]

    @property
    def needs_sampler(self) -> bool:
        """Whether the policy writes text in this run: as rollouts, or to be evaluated."""
        source = self.objective.facts.learns_from
        rollouts = source is LearnsFrom.POOLS and any(s.rollouts for s in self.candidates)
        return rollouts or source is LearnsFrom.GENERATIONS or self.eval.generate

    @property
    def needs_judge(self) -> bool:
        """Whether anything is judged: candidates, rewrites in training, or what is written to be evaluated."""
        if self.task != "policy":
            return self.task == "rewriter"
        return self.eval.generate or self.objective.facts.needs_judge

    @property
    def needs_rewriter(self) -> bool:
        """Whether suffixes are rewritten in this run."""
        pools = self.objective.facts.learns_from is LearnsFrom.POOLS
        return pools and any(s.rewrite for s in self.candidates)

    @property
    def key_names(self) -> list[str]:
        """Environment variables that hold keys of servers."""
        servers = (self.judge.server, self.rewriter.server, self.corruptor.server)
        return [server.key_env for server in servers if server.key_env]

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference policy."""
        return self.objective.facts.needs_reference

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for check in (
            _check_sources,
            _check_safety,
            _check_stages,
            _check_objective,
            _check_task,
            _check_sampler,
            _check_parallel,
            _check_lengths,
        ):
            check(self)
        return self


def _check_task(cfg: RunConfig) -> None:
    if cfg.task == "policy":
        return
    if cfg.data.path is None or cfg.data.eval_path is None:
        raise ValueError(
            f'task="{cfg.task}" needs data.path and data.eval_path, files of prompts; `sip data` writes them'
        )


def _check_sources(cfg: RunConfig) -> None:
    if cfg.task == "policy" and cfg.world is not None and cfg.data.path is not None:
        raise ValueError("both data.path and [world] are set: remove one")
    _check_mixture(cfg)
    for name, section in (("judge", cfg.judge), ("rewriter", cfg.rewriter), ("corruptor", cfg.corruptor)):
        if section.backend == "world" and cfg.world is None:
            raise ValueError(
                f'{name}.backend = "world" knows the synthetic world only: add a [world] section'
            )
        _check_server(name, section.backend, section.server)
        known: Registry[Any] = {"judge": JUDGES, "rewriter": REWRITERS, "corruptor": CORRUPTORS}[name]
        if section.options and known.is_built_in(section.backend):
            raise ValueError(
                f'{name}.options is set, but {name}.backend = "{section.backend}" has none: remove it, or name '
                "another package's"
            )
    for name, section in (("judge", cfg.judge), ("rewriter", cfg.rewriter)):
        if section.backend == "local" and section.local.checkpoint is None:
            raise ValueError(f'{name}.backend = "local" needs {name}.local.checkpoint: set it')
        if section.backend != "local" and section.local != LocalModelConfig():
            raise ValueError(f'{name}.local is set, but {name}.backend is "{section.backend}": remove one')


def _check_mixture(cfg: RunConfig) -> None:
    sources = cfg.data.sources
    if not sources:
        return
    other = "data.path" if cfg.data.path is not None else "[world]" if cfg.world is not None else ""
    if other:
        raise ValueError(f"both data.sources and {other} are set: remove one")
    if cfg.task != "policy":
        raise ValueError(f'task="{cfg.task}" reads prompts: data.sources is for documents, remove it')
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"data.sources: two are called {max(names, key=names.count)!r}: rename one")
    weights = [source.weight for source in sources if source.weight is not None]
    if 0 < len(weights) < len(sources):
        raise ValueError("data.sources: give all a weight, or none")
    if weights and not sum(weights):
        raise ValueError("data.sources: all weights are 0: give one a weight")


def _check_safety(cfg: RunConfig) -> None:
    if not (cfg.needs_judge and cfg.judge.mutual_information):
        return
    setting = f'judge.{cfg.judge.backend}.method = "mutual_information" says nothing of safety'
    if cfg.task == "rewriter":
        raise ValueError(f"{setting}, which rewrites are graded by: choose another judge")
    if cfg.judge.weights.safety:
        raise ValueError(f"{setting}: set judge.weights.safety = 0, or choose another judge")


def _check_server(name: str, backend: str, server: ServerConfig) -> None:
    if backend != "server" and server != type(server)():
        raise ValueError(
            f'{name}.server is set, but {name}.backend is "{backend}": set {name}.backend = "server", '
            f"or remove {name}.server"
        )
    for key in ("url", "model"):
        if backend == "server" and not getattr(server, key):
            raise ValueError(f'{name}.backend = "server" needs {name}.server.{key}: set it')


def _check_stages(cfg: RunConfig) -> None:
    starts = [stage.from_step for stage in cfg.candidates]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise ValueError(f"candidates: from_step must rise from 0, got {starts}")


def _check_objective(cfg: RunConfig) -> None:
    facts = cfg.objective.facts
    facts.check(cfg)
    if cfg.objective.document_nll_weight and facts.learns_from is not LearnsFrom.POOLS:
        raise ValueError(
            "objective.document_nll_weight stands beside a choice among candidates, which objective.kind = "
            f'"{cfg.objective.kind}" does not make: remove it'
        )


def _check_sampler(cfg: RunConfig) -> None:
    if not cfg.needs_sampler:
        return
    most = max((stage.rollouts for stage in cfg.candidates), default=0)
    asked = {"candidates.rollouts": most} if cfg.task == "policy" else {}
    if cfg.objective.facts.learns_from is LearnsFrom.GENERATIONS:
        asked = {"objective.generations": cfg.objective.generations}
    for name, count in asked.items():
        if count > cfg.sampler.max_sequences:
            raise ValueError(
                f"{name}={count} of one prefix exceed sampler.max_sequences={cfg.sampler.max_sequences}: "
                "raise it, or ask for fewer"
            )


def _check_parallel(cfg: RunConfig) -> None:
    model, parallel = cfg.model, cfg.parallel
    for name in ("num_heads", "num_kv_heads", "ffn_size"):
        if getattr(model, name) % parallel.tensor:
            raise ValueError(
                f"parallel.tensor={parallel.tensor} does not divide model.{name}={getattr(model, name)}"
            )
    if model.num_layers % parallel.pipeline:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} does not divide model.num_layers={model.num_layers}"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ValueError("parallel.sequence needs parallel.tensor of 2 or more")


def _check_lengths(cfg: RunConfig) -> None:
    data = cfg.data
    need = data.max_prefix_tokens + data.suffix_tokens
    if need > cfg.model.max_context:
        raise ValueError(
            f"data.max_prefix_tokens + data.suffix_tokens = {need} exceed model.max_context="
            f"{cfg.model.max_context}: lower the prefix or raise the context"
        )
    if data.min_prefix_tokens > data.max_prefix_tokens:
        raise ValueError(
            f"data.min_prefix_tokens={data.min_prefix_tokens} is above max_prefix_tokens={data.max_prefix_tokens}"
        )
