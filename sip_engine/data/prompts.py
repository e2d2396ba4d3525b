"""Prompts with known answers: a JSONL file as samples, in an order that is shuffled anew in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sip_engine.data.permutation import Permutation
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.types import Labels, Sample
from sip_engine.utils.errors import CheckpointError, DataError
from sip_engine.utils.files import sha256_of
from sip_engine.utils.jsonl import read_jsonl


def prompt_records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and record of each line: {"prompt", "answer", ...} or {"text", "labels", ...}.

    Raises:
        DataError: no such file, unreadable, or a line that is no such object; names file and line.
    """
    return [(number, _checked(record, f"{path}:{number}")) for number, record in read_jsonl(path)]


def read_prompts(
    path: Path, tokenizer: Tokenizer, *, max_prompt_tokens: int, max_answer_tokens: int
) -> list[Sample]:
    """Samples of {"prompt": text, "answer": text, ...}: prefix is bos and the prompt, suffix the answer and eos.

    Or of {"text": text, "labels": [[end, label], ...], ...}: prefix is bos, suffix the text, and labels are the
    labels' tokens after those that hold the text's characters before `end`. A label is one token, and ends rise. All
    other fields go along as `facts`. Lines are numbered from 0 as documents.

    Raises:
        DataError: as of `prompt_records`; or a line is too long, or a label is not one token.
    """
    samples = []
    for number, record in prompt_records(path):
        sample = _labelled if "labels" in record else _answered
        try:
            samples.append(sample(record, number - 1, tokenizer))
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    if not samples:
        raise DataError(
            f"{path}: holds no prompts; `sip data judge-pairs`, `… notes` and `… rewrites` write some"
        )
    for s in samples:
        read, written = ("prompt", len(s.prefix_ids)), ("answer", len(s.suffix_ids))
        if s.labels is not None:
            read, written = ("text", len(s.prefix_ids) + len(s.suffix_ids)), ("answer", 0)
        for (what, number), limit, setting in (
            (read, max_prompt_tokens, "data.max_prefix_tokens"),
            (written, max_answer_tokens, "data.suffix_tokens"),
        ):
            if number > limit:
                raise DataError(
                    f"{path}:{s.document + 1}: the {what} has {number} tokens, above {setting}={limit}; raise it"
                )
    return samples


def _checked(record: dict[str, Any], where: str) -> dict[str, Any]:
    if "labels" in record:
        text = record.get("text")
        if not isinstance(text, str) or not text or not _are_labels(record["labels"], text):
            raise DataError(
                f'{where}: expected {{"text": text, "labels": [[end, letter], ...]}}, each end a number of '
                "characters and above the one before"
            )
        return record
    if not all(isinstance(record.get(k), str) for k in ("prompt", "answer")):
        raise DataError(f'{where}: expected {{"prompt": text, "answer": text}}')
    if not record["prompt"] or not record["answer"]:
        raise DataError(f"{where}: prompt and answer must not be empty")
    return record


def _answered(record: dict[str, Any], number: int, tokenizer: Tokenizer) -> Sample:
    prompt, answer = record.pop("prompt"), record.pop("answer")
    prefix = np.concatenate([tokenizer.begin, tokenizer.encode(prompt)]).astype(np.int32)
    suffix = np.concatenate([tokenizer.encode(answer), [tokenizer.eos_id]]).astype(np.int32)
    return Sample(number, 0, prefix, suffix, prompt, answer, record)


def _labelled(record: dict[str, Any], number: int, tokenizer: Tokenizer) -> Sample:
    text, labels = record.pop("text"), record["labels"]
    ids = tokenizer.encode(text).astype(np.int32)
    places = tokenizer.positions(ids, text, [end for end, _ in labels])
    answers = [tokenizer.encode(label) for _, label in labels]
    for (_, label), answer in zip(labels, answers, strict=True):
        if len(answer) != 1:
            raise DataError(f"the label {label!r} is {len(answer)} tokens, not one: use a letter")
    answer = Labels(places, np.concatenate(answers).astype(np.int32))
    return Sample(number, 0, tokenizer.begin, ids, "", text, record, answer)


def _are_labels(labels: Any, text: str) -> bool:
    return (
        isinstance(labels, list)
        and len(labels) > 0
        and all(isinstance(one, list) and len(one) == 2 for one in labels)
        and all(type(end) is int and 0 < end <= len(text) for end, _ in labels)
        and all(one[0] < other[0] for one, other in pairwise(labels))
        and all(isinstance(label, str) and label.strip() for _, label in labels)
    )


class PromptStream:
    """An endless sequence of prompts; like `SampleStream`, independent of batch size and number of ranks."""

    def __init__(self, samples: Sequence[Sample], path: Path, seed: int) -> None:
        self.position = 0
        self._samples = samples
        self._order = {"prompts": sha256_of(path), "seed": seed, "num_samples": len(samples)}

    def next_batch(self, batch_size: int, rank: int = 0, num_ranks: int = 1) -> list[Sample]:
        """This rank's share of the next `batch_size` samples; moves on by the whole batch."""
        places = self.position + np.arange(rank, batch_size, num_ranks, dtype=np.int64)
        self.position += batch_size
        return self._at(places)

    def samples_at(self, position: int, count: int) -> list[Sample]:
        """Samples `position` to `position + count` of the sequence; changes nothing."""
        return self._at(np.arange(position, position + count, dtype=np.int64))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on here; plain JSON values."""
        return {"position": self.position, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. Raises CheckpointError if its order of prompts is another."""
        saved = state.get("order")
        saved = saved if isinstance(saved, dict) else {}
        for name, value in self._order.items():
            if saved.get(name) != value:
                raise CheckpointError(
                    f"the checkpoint's data order has {name} {saved.get(name)} but this run has {value}; "
                    "resume with the data settings of the checkpoint or start the data anew"
                )
        position = state.get("position")
        if type(position) is not int or position < 0:
            raise CheckpointError(f"the checkpoint's data position is {position!r}; copy the checkpoint anew")
        self.position = position

    def _at(self, positions: np.ndarray) -> list[Sample]:
        epochs, places = np.divmod(positions, len(self._samples))
        chosen: list[Sample] = []
        for epoch in np.unique(epochs).tolist():
            order = Permutation(len(self._samples), int(self._order["seed"]), epoch)
            chosen.extend(self._samples[i] for i in order(places[epochs == epoch]).tolist())
        return chosen
