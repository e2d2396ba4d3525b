"""The front door for Python: a checkpoint's policy in text, sampled, scored and trained in one process.

What a notebook needs in about ten lines; `train` is for whole runs. Everything else of the package takes token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sip_engine.config.model import ModelConfig
from sip_engine.config.parse import parse_config
from sip_engine.config.schema import RunConfig, SamplerConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.checkpoint import resolve_checkpoint
from sip_engine.policy.policy import Policy, UpdateStats
from sip_engine.policy.reference import Reference
from sip_engine.policy.rows import Row
from sip_engine.sampler.frozen import FrozenPolicy, encode_prompt
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.types import Candidate, Choice, Kind, Sample
from sip_engine.utils.errors import RequestError


@dataclass(frozen=True)
class TextCompletion:
    """A sampled continuation: its text, its ids [tokens] int32 and their log-probs [tokens] float32, nats.

    Log-probs are the policy's at temperature 1, before top-k and top-p. The end-of-document id, where sampling ended
    there, counts among the ids and has no text.
    """

    text: str
    ids: np.ndarray
    logprobs: np.ndarray


class TextPolicy:
    """A policy that continues texts and scores them. Made by `load_policy`; a `Trainer` trains it.

    Attributes:
        tokenizer: the checkpoint's own.
        sampler: over the policy's own weights, for token ids (`Request`).
        model_config: shape of the model.
    """

    def __init__(self, frozen: FrozenPolicy, model_config: ModelConfig, kv_memory_mb: int) -> None:
        self.model_config = model_config
        self._kv_memory_mb = kv_memory_mb
        self._read(frozen)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._frozen.tokenizer

    @property
    def mesh(self) -> Mesh:
        return self._frozen.mesh

    def generate(
        self, prompts: Sequence[str], params: SamplingParams, *, n: int = 1
    ) -> list[list[TextCompletion]]:
        """`n` continuations of each prompt, in order; they end at end-of-document unless `params` says where.

        A prompt begins a document: the tokenizer's bos is put in front. One seed gives the same continuations again.

        Raises:
            RequestError: a parameter is out of its range, or a prompt and its continuations exceed the model's
                context or the memory of the KV pages.
        """
        if not params.stop_ids:
            params = replace(params, stop_ids=(self.tokenizer.eos_id,))
        requests = [
            Request(encode_prompt(self.tokenizer, text), n, number) for number, text in enumerate(prompts)
        ]
        decode = self.tokenizer.decode
        return [
            [TextCompletion(decode(c.ids), c.ids, c.logprobs) for c in group]
            for group in self.sampler.generate(requests, params)
        ]

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """[pairs] float64 nats: the summed log-prob of each (prompt, continuation)'s continuation.

        Raises:
            RequestError: a continuation is empty, or a pair exceeds the model's context.
        """
        return np.array([values.sum(dtype=np.float64) for values in self.token_logprobs(pairs)])

    def token_logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[np.ndarray]:
        """[tokens] float32 nats for each pair: the log-prob of each token of the continuation. Raises as `score`."""
        rows = []
        for number, (prompt, text) in enumerate(pairs):
            prefix, (ids,) = self.encode(prompt, text, what=f"pair {number}")
            rows.append(Row(prefix, (ids,)))
        return [found.logprobs for (found,) in self._frozen.score_rows(rows)] if rows else []

    def encode(self, prompt: str, *texts: str, what: str = "prompt") -> tuple[np.ndarray, list[np.ndarray]]:
        """Ids int32 of a prompt, bos in front, and of texts that continue it.

        Raises:
            RequestError: a text is empty, or too long for the model's context together with the prompt.
        """
        prefix, most = encode_prompt(self.tokenizer, prompt), self._frozen.max_context
        continuations = [self.tokenizer.encode(text) for text in texts]
        for ids in continuations:
            if len(ids) == 0:
                raise RequestError(f"{what}: the continuation is empty; give at least one token")
            if len(prefix) + len(ids) > most:
                raise RequestError(
                    f"{what}: {len(prefix)} + {len(ids)} tokens exceed the model's context of {most}; shorten it"
                )
        return prefix, continuations

    def _read(self, frozen: FrozenPolicy) -> None:
        """From now on sample and score with the weights of `frozen`."""
        self._frozen = frozen
        self.sampler: Sampler = frozen.sampler(SamplerConfig(kv_memory_mb=self._kv_memory_mb))


def load_policy(checkpoint: str | Path, *, kv_memory_mb: int = 256) -> TextPolicy:
    """The policy of a checkpoint, or of a run's newest one, in this process; on the GPU where there is one.

    kv_memory_mb: MiB that sampling may take for its pages.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    frozen, state = FrozenPolicy.load(resolve_checkpoint(Path(checkpoint)), start_mesh())
    return TextPolicy(frozen, state.model.without_fp8(), kv_memory_mb)


class Trainer:
    """Trains a loaded policy by DPO (arXiv 2305.18290, eq. 7) on preferences in text; the reference is where it was.

    `policy` reads the weights in training from then on: what it samples and scores after a step is the new policy.
    """

    def __init__(self, policy: TextPolicy, *, lr: float = 5e-6, beta: float = 0.1, seed: int = 0) -> None:
        """Take the policy's weights; adds AdamW's state, gradients and a reference policy to its memory.

        lr: constant. beta: strength of the pull towards the reference policy.

        Raises:
            ConfigError: lr or beta is not above 0.
        """
        cfg = _config(policy.model_config, lr, beta, seed)
        vocab_size, mesh = policy.tokenizer.vocab_size, policy.mesh
        self._objective = open_objective(cfg.objective)
        self._policy = Policy(cfg, vocab_size, mesh)
        with torch.no_grad():
            before = policy._frozen.model.parameters()
            for ours, theirs in zip(self._policy.model.parameters(), before, strict=True):
                ours.copy_(theirs)
        self._policy.optimizer.reload_model_params()
        self._reference = Reference(cfg, vocab_size, mesh)
        self._reference.copy_from(self._policy)
        self.policy = policy
        policy._read(FrozenPolicy(self._policy.model, policy.tokenizer, mesh))

    def step(self, preferences: Sequence[tuple[str, str, str]]) -> UpdateStats:
        """One optimizer step on (prompt, chosen, rejected) texts; the loss is a mean over them, in nats.

        Raises:
            RequestError: there is no preference, a text is empty, or one is too long for the model's context.
            NonFiniteError: loss or gradient is not finite; nothing was updated.
        """
        if not preferences:
            raise RequestError("a step needs at least one (prompt, chosen, rejected)")
        rows = []
        for number, (prompt, *texts) in enumerate(preferences):
            prefix, continuations = self.policy.encode(prompt, *texts, what=f"preference {number}")
            pool = [Candidate(Kind.ROLLOUT, k, ids, texts[k]) for k, ids in enumerate(continuations)]
            sample = Sample(number, len(prefix), prefix, continuations[0], prompt, texts[0])
            rows.append(self._objective.row_of_choice(Choice(sample, tuple(pool), chosen=0, rejected=1)))
        return update(self._policy, self._reference, rows, self._objective)


def _config(model: ModelConfig, lr: float, beta: float, seed: int) -> RunConfig:
    """Settings of a policy that is trained by hand: a constant rate, and lengths that any model has."""
    return parse_config(
        {
            "seed": seed,
            "model": model.model_dump(),
            "data": {"suffix_tokens": 1, "max_prefix_tokens": 1, "min_prefix_tokens": 1},
            "objective": {"kind": "dpo", "beta": beta},
            "optimizer": {"lr": lr, "min_lr_ratio": 1.0, "warmup_steps": 0, "weight_decay": 0.0},
        },
        "Trainer",
    )
