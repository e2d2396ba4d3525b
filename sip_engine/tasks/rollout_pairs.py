"""`sip data rollout-pairs`: a checkpoint's own rollouts with the labels of a judge, to train another judge on.

Corrupted copies teach a judge what corruption looks like. What it will be asked about are rollouts of one prefix,
which are alike in style and differ in substance: another distribution (README, training a judge).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sip_engine.config.schema import RunConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.judges.open import open_judge
from sip_engine.llm.compact_prompts import compact_prompt
from sip_engine.policy.checkpoint import resolve_checkpoint
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.tasks.files import Record, held_out_numbers, open_documents, read_mix, shuffled, write_records
from sip_engine.tasks.labels import labels_of, records_of_labels
from sip_engine.tasks.specs import RolloutPairs
from sip_engine.types import FactualityQuestion, Judge, PairQuestion, SafetyQuestion, Sample
from sip_engine.utils.errors import ConfigError, RequestError
from sip_engine.utils.progress import steps

ROLLOUTS = 4
"""Rollouts of a prefix; they make two pairs, so that no text is in more than one."""
_CHUNK = 64


def make_rollout_pairs(cfg: RunConfig, out: Path, spec: RolloutPairs) -> None:
    """Write `out`/train.jsonl and `out`/eval.jsonl: pairs of rollouts in both orders, safety and factuality.

    The rollouts are those of the checkpoint `init`, the labels those of `judge`. `spec.mix` is a folder that
    `sip data judge-pairs` wrote, of whose prompts `spec.mix_num` are shuffled among these, or all.

    Raises:
        SipError: bad settings or data, before anything is written.
    """
    if cfg.init is None:
        raise ConfigError("rollouts need a policy: set init to a checkpoint")
    mixed_train, mixed_eval = read_mix(spec.mix)
    if spec.mix_num is not None:
        mixed_train = shuffled(mixed_train, cfg.seed)[: spec.mix_num]
    mesh, corpus = open_documents(cfg, out, "judge", spec.held_out)
    policy, _ = FrozenPolicy.load(resolve_checkpoint(cfg.init), mesh)
    sampler, judge = policy.sampler(cfg.sampler), open_judge(cfg, corpus, mesh)

    def records(samples: Sequence[Sample], pairs: int, safety: int, factuality: int) -> list[Record]:
        seed = cfg.seed + (samples is corpus.held_out)
        return rollout_records(
            samples,
            sample_rollouts(sampler, corpus.tokenizer, samples, seed),
            judge,
            num_pairs=pairs,
            num_safety=safety,
            num_factuality=factuality,
            max_prefix_chars=spec.max_prefix_chars,
        )

    wanted = (spec.pairs, spec.safety, spec.factuality)
    samples = corpus.stream.samples_at(0, min(corpus.num_samples, max(wanted)))
    made = records(samples, *wanted) + mixed_train
    held_numbers = held_out_numbers(spec.held_out, spec.safety, spec.factuality)
    held_out = records(corpus.held_out, *held_numbers) + mixed_eval
    number = 2 * spec.pairs + spec.safety + spec.factuality + len(mixed_train)
    write_records(out, shuffled(made, cfg.seed), held_out, wanted=number)


def sample_rollouts(
    sampler: Sampler, tokenizer: Tokenizer, samples: Sequence[Sample], seed: int
) -> list[list[str]]:
    """Texts of four rollouts a sample, as long as its suffix, at temperature 1.

    Raises:
        ConfigError: a sample does not fit the policy's context.
    """
    texts: list[list[str]] = []
    chunks = range(0, len(samples), _CHUNK)
    with steps("rollouts", len(chunks)) as bar:
        for start in chunks:
            these = samples[start : start + _CHUNK]
            params = SamplingParams(max(len(s.suffix_ids) for s in these), seed=seed)
            requests = [Request(s.prefix_ids, ROLLOUTS, s.document, s.cut) for s in these]
            try:
                sampler.check(requests, params)
            except RequestError as error:
                raise ConfigError(f"data.max_prefix_tokens, data.suffix_tokens: {error}") from None
            for group in sampler.generate(requests, params):
                texts.append([tokenizer.decode(done.ids) for done in group])
            bar.advance({})
    return texts


def rollout_records(
    samples: Sequence[Sample],
    rollouts: Sequence[Sequence[str]],
    labeller: Judge,
    *,
    num_pairs: int,
    num_safety: int,
    num_factuality: int,
    max_prefix_chars: int | None,
) -> list[Record]:
    """At most `num_pairs` pairs of rollouts in both orders, and so many labels of single ones (see `judge_records`).

    Only pairs are kept of which all votes, in both orders, prefer the same rollout: one that the labeller likes for
    its place alone says nothing about the texts.
    """
    asked = list(_pairs(samples, rollouts)) if num_pairs else []
    records: list[Record] = []
    labels = labels_of(labeller, asked)
    for (question, label), (swapped, other_way) in zip(labels, labels, strict=True):  # two at a time
        if len(records) >= 2 * num_pairs:
            break
        if label is None or other_way is None or label == other_way:
            continue
        for answer, shown in (
            (("1", question), ("2", swapped)) if label else (("2", question), ("1", swapped))
        ):
            records.append(
                {"prompt": compact_prompt(shown, max_prefix_chars), "answer": answer, "kind": "rollouts"}
            )
    texts = [(s, text) for s, group in zip(samples, rollouts, strict=True) for text in group]
    safety = [SafetyQuestion(text, s.prefix) for s, text in texts] if num_safety else []
    factuality = [FactualityQuestion(s.prefix, s.suffix, text) for s, text in texts] if num_factuality else []
    records += records_of_labels(safety, labeller, num_safety, "safety", None)
    records += records_of_labels(factuality, labeller, num_factuality, "factuality", max_prefix_chars)
    return records


def _pairs(samples: Sequence[Sample], rollouts: Sequence[Sequence[str]]) -> Iterator[PairQuestion]:
    """Each pair and, next to it, the same the other way round."""
    for s, group in zip(samples, rollouts, strict=True):
        for first, second in zip(group[::2], group[1::2], strict=True):
            if first != second:
                yield PairQuestion(s.prefix, first, second)
                yield PairQuestion(s.prefix, second, first)
