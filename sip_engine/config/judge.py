"""[judge], [rewriter] and [corruptor]: who scores, improves and worsens suffixes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from sip_engine.config.backends import CORRUPTORS, JUDGES, REWRITERS
from sip_engine.config.section import Positive, Section, Seed, Share, former
from sip_engine.utils.copied import RUN


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
    copied_run: Annotated[int, Field(ge=0)] = RUN
    """As judge.local.copied_run."""
    style: Literal["reasoned", "direct", "compact"] = "reasoned"
    """reasoned: brief reasoning, then the verdict (method); direct: the verdict alone, for small models; compact:
    prompts without instructions, for models trained on `sip data`, exported and served."""


class LocalModelConfig(Section):
    """A checkpoint that judges or rewrites inside the engine, on the policy's own processes."""

    checkpoint: Path | None = None
    """A checkpoint, or the folder of a run: trained with task = "judge" or "rewriter", or imported."""
    method: Literal["log_odds", "generate", "sentence_labels", "mutual_information"] = "log_odds"
    """Judge: log_odds reads the probabilities of the verdict words; generate writes a reply and reads its verdict.
    sentence_labels: as log_odds, but reads the label that the model gives to the end of every sentence: each
    continuation is read once, not once a comparison, and the one of the better labels is the better; they also say
    how safe and how true it is (for models trained with `sip data sentence-labels`; style = "compact").
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
    copied_run: Annotated[int, Field(ge=0)] = RUN
    """mutual_information: a token within so many in a row that stand in the prefix as well earns nothing: a copy is
    foreseen at any rate. 0: it counts as any other."""
    max_prefix_chars: Positive | None = None
    """A longer prefix keeps its end."""
    max_sequences: Positive = 256
    """Most replies generated together."""
    kv_memory_mb: Positive = 512
    """Memory of the KV pages on each process, in MiB."""

    @field_validator("method", mode="before")
    @classmethod
    def _former_names(cls, value: Any) -> Any:
        return former(value, "sentence_labels", "notes")

    @model_validator(mode="after")
    def _labels_are_learned(self) -> LocalModelConfig:
        if self.method in ("sentence_labels", "mutual_information") and self.style != "compact":
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
    price_read: float | None = Field(default=None, ge=0)
    """Dollars for a million tokens that the judge reads; with either price set, `judge/dollars` is in the metrics."""
    price_written: float | None = Field(default=None, ge=0)
    """Dollars for a million tokens that the judge writes."""
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
    """rules and edits: for any text, no model, and no way in common, so that one tests what the other taught; world:
    the synthetic world's own rules; server: a model behind a URL; or the name of another package's."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of another package's corruptor."""
    server: ServerConfig = ServerConfig()
