"""Propose: the original, the rewrite and the policy's rollouts of each prefix; and replies to a task's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sip_engine.config.schema import CandidateStage, RunConfig, SamplerConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.sampler.requests import Completion, Request, SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.types import Candidate, Failure, Kind, Rewriter, RewriteRequest, Sample


@dataclass(frozen=True)
class Proposed:
    """The pools of a batch, one a sample, and why rewrites are missing where they are."""

    pools: list[list[Candidate]]
    failed_rewrites: list[str]


def propose(
    samples: Sequence[Sample],
    stage: CandidateStage,
    sampler: Sampler | None,
    rewriter: Rewriter | None,
    tokenizer: Tokenizer,
    cfg: SamplerConfig,
    *,
    seed: int,
    step: int,
) -> Proposed:
    """Each sample's candidates in the order original, rewrite, rollouts; a failed rewrite is left out."""
    pools: list[list[Candidate]] = [[] for _ in samples]
    failed: list[str] = []
    if stage.original:
        for pool, s in zip(pools, samples, strict=True):
            pool.append(Candidate(Kind.ORIGINAL, 0, s.suffix_ids, s.suffix))
    if stage.rewrite and rewriter is not None:
        rewrites = rewriter.rewrite([RewriteRequest(s.prefix, s.suffix) for s in samples], seed=seed + step)
        for pool, s, text in zip(pools, samples, rewrites, strict=True):
            fitted = text if isinstance(text, Failure) else fit(text, tokenizer, len(s.suffix_ids))
            if isinstance(fitted, Failure):
                failed.append(fitted.reason)
            else:
                pool.append(fitted)
    if stage.rollouts and sampler is not None:
        for pool, rollouts in zip(
            pools, _rollouts(samples, stage, sampler, tokenizer, cfg, seed, step), strict=True
        ):
            pool.extend(rollouts)
    return Proposed(pools, failed)


def fit(text: str, tokenizer: Tokenizer, num_tokens: int) -> Candidate | Failure:
    """A rewrite as a candidate of at most `num_tokens` tokens; an empty one is a failure."""
    ids = tokenizer.encode(text)[:num_tokens]
    if len(ids) == 0:
        return Failure("the rewrite is empty")
    return Candidate(Kind.REWRITE, 0, ids, tokenizer.decode(ids))


def _rollouts(
    samples: Sequence[Sample],
    stage: CandidateStage,
    sampler: Sampler,
    tokenizer: Tokenizer,
    cfg: SamplerConfig,
    seed: int,
    step: int,
) -> list[list[Candidate]]:
    params = SamplingParams(
        max_new_tokens=max(len(s.suffix_ids) for s in samples),
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        seed=seed,
        step=step,
    )
    requests = [Request(s.prefix_ids, stage.rollouts, s.document, s.cut) for s in samples]
    return [
        [
            Candidate(Kind.ROLLOUT, n, done.ids, tokenizer.decode(done.ids), done.logprobs)
            for n, done in enumerate(completions)
        ]
        for s, completions in zip(samples, sampler.generate(requests, params), strict=True)
    ]


def reply(
    samples: Sequence[Sample],
    *,
    n: int,
    sampler: Sampler,
    tokenizer: Tokenizer,
    cfg: RunConfig,
    step: int,
    greedy: bool = False,
) -> tuple[list[list[Completion]], list[list[str | None]]]:
    """`n` generations for each prompt of a task, up to end-of-text, and their texts; None where that did not come."""
    ends = tokenizer.eos_ids
    params = SamplingParams(
        cfg.data.suffix_tokens,
        temperature=cfg.sampler.temperature,
        top_p=cfg.sampler.top_p,
        top_k=cfg.sampler.top_k,
        greedy=greedy,
        seed=cfg.seed,
        step=step,
        stop_ids=ends,
    )
    done = sampler.generate([Request(s.prefix_ids, n, s.document, s.cut) for s in samples], params)
    texts = [[tokenizer.decode(c.ids[:-1]) if c.ids[-1] in ends else None for c in group] for group in done]
    return done, texts
