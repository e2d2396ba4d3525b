"""Every setting of a run, with its meaning; unknown keys and conflicts are refused with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from sip_engine.config.backends import CORRUPTORS, JUDGES, REWRITERS
from sip_engine.config.objective import LearnsFrom, ObjectiveConfig
from sip_engine.config.section import Decay, Positive, Section, Seed, Share
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.registry import Registry


class Fp8Config(Section):
    """How Transformer Engine scales FP8 matrices; read with precision = "fp8" only."""

    recipe: Literal["delayed", "current", "blockwise"] = "current"
    """delayed: scales from earlier steps; current: of the tensor itself; blockwise: one for 128 x 128 or 1 x 128."""
    bf16_ends: bool = False
    """Compute the first and the last layer in bf16."""

    @model_validator(mode="after")
    def _delayed_everywhere(self) -> Fp8Config:
        if self.bf16_ends and self.recipe == "delayed":
            raise ValueError('bf16_ends does not go with recipe="delayed": choose "current" or "blockwise"')
        return self


class ModelConfig(Section):
    """A Llama-like decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    num_layers: Annotated[int, Field(gt=0, le=10_000)] = 4
    """Transformer layers."""
    hidden_size: Positive = 128
    """Width of the residual stream."""
    num_heads: Positive = 4
    """Query heads."""
    num_kv_heads: Positive = 2
    """Key/value heads; divides `num_heads`."""
    head_dim: Positive | None = None
    """Channels of a head; unset is hidden_size / num_heads."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values, as Qwen2 does."""
    qk_norm: bool = False
    """RMSNorm over the channels of each query and key head, as in Qwen3."""
    ffn_size: Positive = 352
    """Inner width of the SwiGLU block."""
    max_context: Positive = 2048
    """Longest prefix plus suffix, in tokens."""
    rope_base: float = Field(default=10000.0, gt=0)
    """Base of the rotary wavelengths."""
    rope_factor: float = Field(default=1.0, ge=1)
    """Stretch rotary wavelengths beyond the original context by this, as `rope_scaling` says; 1 leaves them."""
    rope_scaling: Literal["llama3", "linear", "yarn"] = "llama3"
    """llama3: long wavelengths, as Llama 3.1 does; linear: all of them; yarn: those that turn rarely (2309.00071)."""
    rope_low_freq_factor: float = Field(default=1.0, gt=0)
    """Wavelengths above rope_original_context / this are stretched in full."""
    rope_high_freq_factor: float = Field(default=4.0, gt=0)
    """Wavelengths below rope_original_context / this are left as they are; in between the two are blended."""
    rope_original_context: Positive = 8192
    """Context that the stretched model was first trained for, in tokens."""
    rope_beta_fast: float = Field(default=32.0, gt=0)
    """yarn: channels that turn more often than this in the original context are left as they are."""
    rope_beta_slow: float = Field(default=1.0, gt=0)
    """yarn: channels that turn less often than this are stretched in full."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon inside RMSNorm."""
    tie_embeddings: bool = False
    """Share the input embedding with the output head."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """auto is bf16 on CUDA and fp32 on the CPU; fp8 computes matrices of bf16 parameters in FP8, on Hopper GPUs.
    Whatever it is, the optimizer's master weights and both Adam moments are fp32."""
    fp8: Fp8Config = Fp8Config()

    @field_validator("head_dim")
    @classmethod
    def _unset_if_usual(cls, value: int | None, info: ValidationInfo) -> int | None:
        """One way to say one thing, so that settings of the same model compare equal."""
        hidden, heads = info.data.get("hidden_size"), info.data.get("num_heads")
        return None if value and heads and hidden == value * heads else value

    def without_fp8(self) -> ModelConfig:
        """The same model to be read rather than trained, which any machine can do."""
        return self.model_copy(update={"precision": "auto"}) if self.precision == "fp8" else self

    @property
    def kv_channels(self) -> int:
        """Channels of a head, whether set or derived."""
        return self.head_dim or self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.kv_channels % 2:
            name = "hidden_size / num_heads" if self.head_dim is None else "head_dim"
            raise ValueError(f"{name} must be even: rotary positions turn pairs of channels")
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise ValueError(
                f"rope_low_freq_factor={self.rope_low_freq_factor} must be below "
                f"rope_high_freq_factor={self.rope_high_freq_factor}"
            )
        return self


class DataSource(Section):
    """One part of a mixture of corpora, `[[data.sources]]`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """What records call it: `sources/NAME` is its share of a step's samples."""
    path: Path
    """As data.path."""
    weight: float | None = Field(default=None, ge=0)
    """Its share of the samples, against the other sources'; unset in all: each in proportion to its samples."""
    epochs: float | None = Field(default=None, gt=0)
    """Most passes over it, from when on it is left out; unset: as many as its weight asks for."""
    text_column: str | None = None
    """As data.text_column, which it is if unset."""


class DataConfig(Section):
    """Where documents come from and how they are cut into prefix and suffix."""

    path: Path | None = None
    """File or directory of text (.txt, .md, .rst), JSON (.jsonl, .ndjson, .json), .csv, .tsv, each also .gz, .zst,
    .bz2, .xz, .parquet, .arrow or .feather. Required unless [world] is set."""
    sources: tuple[DataSource, ...] = ()
    """Several corpora in place of `path`, mixed by weight."""
    eval_path: Path | None = None
    """Held-out documents; unset holds back a share of `path`."""
    text_column: str = "text"
    """Field of JSON, CSV, Parquet and Arrow rows that holds the text."""
    tokenizer: Path | None = None
    """A sentencepiece model; trained on the data when unset."""
    vocab_size: Positive = 8192
    """Vocabulary of a tokenizer trained on the data."""
    suffix_tokens: Positive = 128
    """N, the length of a suffix (method: 128)."""
    max_prefix_tokens: Positive = 1920
    """A longer prefix keeps its last tokens."""
    min_prefix_tokens: Positive = 32
    """Cuts with a shorter prefix are not made."""
    cut: Literal["every_chunk", "random_chunk"] = "every_chunk"
    """Use every chunk of a document as a suffix, or one random chunk a document and epoch."""
    cache: Path = Path("cache")
    """Folder of token files, keyed by content."""
    holdout: Share = 0.02
    """Share of the documents kept from training for evaluation, where `eval_path` is unset; of too few documents,
    as of a book, the end of the longest."""


class WorldConfig(Section):
    """A synthetic world with known truth, whose documents stand in for `data.path` and `data.eval_path`."""

    seed: Seed = 0
    """Seed of the world's facts and documents."""
    split: Literal["train", "judge", "rewriter"] = "train"
    """Whose training documents these are; no two of them share a document."""
    num_people: Positive = 48
    """People whose facts there are to know."""
    people_per_document: Annotated[int, Field(ge=2)] = 3
    """People who meet in a document at most; it is the longer for more of them."""
    train_documents: Positive = 8000
    """Documents written for training."""
    test_documents: Positive = 400
    """Documents with combinations of people that no other split shows."""

    @model_validator(mode="after")
    def _can_be(self) -> WorldConfig:
        from sip_engine.world import World

        try:
            World(self.seed, self.num_people, self.people_per_document)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


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
    """Most prefix tokens in one forward pass of the sampler on CUDA, and with stop tokens; a longer prefix has one
    pass to itself."""

    @model_validator(mode="after")
    def _exact_pages(self) -> SamplerConfig:
        if self.batch_invariant and self.kv_dtype == "fp8":
            raise ValueError('batch_invariant needs kv_dtype="auto": FP8 scales depend on the batch')
        return self


class RewardWeights(Section):
    """Weights of the three objectives in the total reward; 0 leaves an objective unasked."""

    quality: float = Field(default=1.0, ge=0)
    """Mean win over the other candidates, in [0, 1]."""
    safety: float = Field(default=1.0, ge=0)
    """Share of votes that call the suffix safe."""
    factuality: float = Field(default=1.0, ge=0)
    """Agreement with the original suffix, in [0, 1]."""

    @model_validator(mode="after")
    def _not_all_zero(self) -> RewardWeights:
        if not (self.quality or self.safety or self.factuality):
            raise ValueError("all reward weights are 0: give quality, safety or factuality a weight")
        return self


class JudgeVotes(Section):
    """Votes on each question of an objective, averaged; a judge that always answers alike is asked once."""

    quality: Positive = 1
    """Votes on a comparison."""
    safety: Positive = 1
    """Votes on a suffix's safety (method: 5 in training)."""
    factuality: Positive = 1
    """Votes on a suffix's factuality."""


class ServerConfig(Section):
    """An OpenAI-compatible chat server (vLLM, SGLang, llama.cpp, a paid one), and how it is asked."""

    url: str = ""
    """Base URL of its API, such as "http://127.0.0.1:8000/v1"; plain http sends texts and key in the clear."""
    model: str = ""
    """Name the server knows the model by."""
    key_env: str = ""
    """Environment variable that holds the key; unset sends none. The key itself is never written down."""
    format: Literal["verdict_line", "json_schema"] = "verdict_line"
    """verdict_line: plain text with one strict line (judge) or block (rewriter); json_schema: JSON, by the server."""
    system_role: bool = True
    """Send the rules as the system's message; off puts them into the user's, for models that know no other."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature (method: 1)."""
    top_p: float = Field(default=0.6, gt=0, le=1)
    """Nucleus (method: 0.6)."""
    max_tokens: Positive = 512
    """Longest reply; a reply cut off there is a failure."""
    seed: Seed = 0
    """Mixed into the seed of each request, and into the marks that fence texts."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, such as chat_template_kwargs or max_completion_tokens."""
    omit: tuple[Literal["temperature", "top_p", "max_tokens", "seed"], ...] = ()
    """Fields to leave out, for servers that refuse them."""
    max_prefix_chars: Positive = 16000
    """A longer prefix keeps its end."""
    concurrency: Annotated[int, Field(gt=0, le=1000)] = 32
    """Most requests at once, from each data-parallel process."""
    request_s: float = Field(default=120.0, gt=0)
    """Seconds that an attempt may take."""
    batch_s: float = Field(default=3600.0, gt=0)
    """Seconds that all requests of one batch may take, with their retries; what is missing then has failed."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """Attempts after the first, on failed connections, timeouts and status 408, 409, 429 and 5xx."""
    backoff_s: float = Field(default=0.5, ge=0)
    """Seconds before the first retry; doubled each time, with jitter. A Retry-After of the server goes first."""
    max_backoff_s: float = Field(default=30.0, ge=0)
    """Longest wait between retries that the server did not ask for."""
    cache: Path | None = None
    """SQLite file of replies, for the same request never to be paid for twice; unset keeps none."""

    @field_validator("url")
    @classmethod
    def _is_base_url(cls, value: str) -> str:
        if not value:
            return value
        try:
            parts = urlsplit(value)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            raise ValueError('not a URL: write it like "http://127.0.0.1:8000/v1"') from None
        if parts.username or parts.password:
            raise ValueError("keep the key out of the URL: export it, and name its variable in key_env")
        if not known or parts.query or parts.fragment:
            raise ValueError(f'{value!r} is not a base URL: write it like "http://127.0.0.1:8000/v1"')
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError("give the base URL: leave out /chat/completions")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _extra_is_extra(self) -> ServerConfig:
        settings = sorted(self.extra_body.keys() & {"model", "temperature", "top_p", "max_tokens", "seed"})
        if settings:
            raise ValueError(f"extra_body.{settings[0]}: set {settings[0]} itself")
        fixed = sorted(
            self.extra_body.keys() & {"messages", "stream", "stream_options", "n", "response_format"}
        )
        if fixed:
            raise ValueError(f"extra_body.{fixed[0]} is not free: remove it")
        return self


class JudgeServerConfig(ServerConfig):
    """The judge's server; see rewriter.server for the same settings."""

    method: Literal["verdicts", "mutual_information"] = "verdicts"
    """verdicts: asked in words; mutual_information: as judge.local.method, through the log-probs of a prompt
    (`completions` with `echo` and `logprobs`, as vLLM and llama.cpp's Python server give them)."""
    pair_temperature: float = Field(default=0.0, ge=0.0)
    """As judge.local.pair_temperature."""
    style: Literal["reasoned", "direct", "compact"] = "reasoned"
    """reasoned: brief reasoning, then the verdict (method); direct: the verdict alone, for small models; compact:
    prompts without instructions, for models trained on `sip data`, exported and served."""


class LocalModelConfig(Section):
    """A checkpoint that judges or rewrites inside the engine, on the policy's own processes."""

    checkpoint: Path | None = None
    """A checkpoint, or the folder of a run: trained with task = "judge" or "rewriter", or imported."""
    method: Literal["log_odds", "generate", "notes", "mutual_information"] = "log_odds"
    """Judge: log_odds reads the probabilities of the verdict words; generate writes a reply and reads its verdict.
    notes: as log_odds, but reads what the model notes at the end of every sentence: each continuation is read once,
    not once a comparison, and the one of the better notes is the better; they also say how safe and how true it is
    (for models trained with `sip data notes`; style = "compact").
    mutual_information: any language model, never asked in words: the better continuation is the one that the prefix
    makes more probable than it is alone; factuality is what the original adds to that. It says nothing of safety."""
    style: Literal["compact", "direct", "reasoned", "chat"] = "compact"
    """Judge: compact prompts are for models trained on `sip data`; the others instruct in words, and `reasoned`
    asks for a brief reasoning before the verdict (with method = "generate"). chat: `direct`, in the chat template
    that came with an imported instruct model."""
    temperature: float = Field(default=0.0, ge=0.0)
    """Of generated replies; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus of generated replies (method: 0.6)."""
    max_new_tokens: Positive = 64
    """Longest reply; a longer one counts as no answer."""
    pair_temperature: float = Field(default=0.0, ge=0.0)
    """mutual_information: a comparison is sigmoid(difference in nats a token / this) (Bradley and Terry); 0:
    the better one wins outright."""
    max_prefix_chars: Positive | None = None
    """A longer prefix keeps its end."""
    max_sequences: Positive = 256
    """Most replies generated together."""
    kv_memory_mb: Positive = 512
    """Memory of the KV pages on each process, in MiB."""

    @model_validator(mode="after")
    def _notes_are_learned(self) -> LocalModelConfig:
        if self.method in ("notes", "mutual_information") and self.style != "compact":
            raise ValueError(
                f'method = "{self.method}" has no prompt in words: leave out style = "{self.style}"'
            )
        return self


class JudgeConfig(Section):
    """Who judges the candidates and what counts."""

    backend: Annotated[str, AfterValidator(JUDGES.check)] = "heuristic"
    """heuristic: rules over text, no model; world: the synthetic world's own truth; server: a model behind a URL;
    local: a checkpoint inside the engine; or the name of another package's."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of another package's judge."""
    server: JudgeServerConfig = JudgeServerConfig()
    local: LocalModelConfig = LocalModelConfig()
    weights: RewardWeights = RewardWeights()
    """Rewards are weighted and added."""
    votes: JudgeVotes = JudgeVotes()
    schedule: Literal["all_pairs", "pivot", "tournament"] = "all_pairs"
    """Which pairs are compared. all_pairs: every one; pivot: one candidate with each other one; tournament: round
    by round those that tell most about which candidate is best and which is worst."""
    pivot: Literal["original", "rewrite", "rollout", "random"] = "original"
    """schedule = "pivot": the first candidate of this kind, or one drawn by seed (also if the pool has none)."""
    budget: Share = 0.25
    """schedule = "tournament": most of all pairs' calls that it may spend; for n candidates never less than
    ceil(3n / 2) - 2 pairs, what settles both ends if the judge never errs."""
    both_orders: bool = False
    """Ask every pair in both orders (for judges whose verdict depends on the order); a pair then costs two calls.
    Else each pair has one order, and all candidates stand first about equally often."""
    max_failure_rate: Share = 0.5
    """The run stops when a larger share of a step's judgments fails."""
    waves: Positive | None = None
    """Parts of each process' share of a step: with backend = "server" one is judged while the next is generated,
    other judges take turns with the sampler. More waves hide more of the judge, but sample fewer sequences at once.
    Unset is 4 with a server, else 1."""

    @property
    def mutual_information(self) -> bool:
        """Whether the judge reads log-probs, which say nothing of safety."""
        section = {"local": self.local, "server": self.server}.get(self.backend)
        return section is not None and section.method == "mutual_information"

    @property
    def num_waves(self) -> int:
        """Waves of a step, whether set or by backend."""
        return self.waves or (4 if self.backend == "server" else 1)


class RewriterConfig(Section):
    """Who rewrites suffixes."""

    backend: Annotated[str, AfterValidator(REWRITERS.check)] = "none"
    """none: there are no rewrites; world: the synthetic world's own rules; server: a model behind a URL;
    local: a checkpoint inside the engine; or the name of another package's."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of another package's rewriter."""
    server: ServerConfig = ServerConfig()
    local: LocalModelConfig = LocalModelConfig()


class CorruptorConfig(Section):
    """Who writes the worse copies of suffixes in a judge's training data (`sip data judge-pairs`)."""

    backend: Annotated[str, AfterValidator(CORRUPTORS.check)] = "rules"
    """rules: for any text, no model; world: the synthetic world's own rules; server: a model behind a URL; or the
    name of another package's."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of another package's corruptor."""
    server: ServerConfig = ServerConfig()


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
