"""`sip generate` and `sip score`: files in, a checkpoint's completions or log-probs out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sip_engine.config.schema import SamplerConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import start_alone
from sip_engine.policy.checkpoint import resolve_checkpoint
from sip_engine.policy.packing import split_by_tokens
from sip_engine.policy.rows import Row
from sip_engine.sampler.frozen import FrozenPolicy, encode_prompt
from sip_engine.sampler.requests import Request, SamplingParams, check_params
from sip_engine.utils.errors import DataError, RequestError
from sip_engine.utils.files import check_writable, write_jsonl
from sip_engine.utils.jsonl import read_jsonl
from sip_engine.utils.progress import console, steps

_CHUNK = 64


def load_policy(checkpoint: Path) -> FrozenPolicy:
    """Load weights and tokenizer of a checkpoint or of a run's newest one.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    policy, _ = FrozenPolicy.load(resolve_checkpoint(checkpoint), start_alone())
    return policy


def generate_file(
    checkpoint: Path, prompts: Path, out: Path, *, n: int, params: SamplingParams, kv_memory_mb: int
) -> None:
    """Write `{"prompt_ids", "completions": [{"ids", "text", "logprobs"}]}` for each prompt, in order.

    Raises:
        RequestError, DataError, CheckpointError: naming the line; nothing is written then.
    """
    check_params(params)
    if n < 1:
        raise RequestError(f"n={n}: must be 1 or more")
    if kv_memory_mb < 1:
        raise RequestError(f"--kv-memory-mb {kv_memory_mb}: must be 1 or more")
    if kv_memory_mb >= 2**31:
        raise RequestError(f"--kv-memory-mb {kv_memory_mb}: no machine has so much; lower kv_memory_mb")
    check_writable(out)
    rows = _read_rows(prompts)
    policy = load_policy(checkpoint)
    encode = _encoder(policy, prompts)
    ids = [encode(number, row, "prompt", bos=True) for number, row in rows]
    sampler = policy.sampler(SamplerConfig(kv_memory_mb=kv_memory_mb, max_sequences=max(256, n)))
    params = replace(params, stop_ids=policy.tokenizer.eos_ids)
    requests = _requests(ids, n)
    for (number, _), request in zip(rows, requests, strict=True):
        try:
            sampler.check([request], params)
        except RequestError as error:
            raise RequestError(f"{prompts}:{number}: {str(error).removeprefix('request 0: ')}") from None
    results = []
    with steps("generate", -(-len(requests) // _CHUNK)) as bar:
        for first in range(0, len(requests), _CHUNK):
            results.extend(sampler.generate(requests[first : first + _CHUNK], params))
            bar.advance({"prompts": len(results)})
    write_jsonl(
        out,
        (
            {
                "prompt_ids": prompt.tolist(),
                "completions": [
                    {
                        "ids": c.ids.tolist(),
                        "text": policy.tokenizer.decode(c.ids),
                        "logprobs": [float(x) for x in c.logprobs],
                    }
                    for c in completions
                ],
            }
            for prompt, completions in zip(ids, results, strict=True)
        ),
    )
    console.print(f"{len(results)} prompts x {n} completions -> {out}")


def _requests(prompts: Sequence[np.ndarray], n: int) -> list[Request]:
    """Numbered by content, so that completions depend on the prompt alone; equal prompts are counted."""
    seen: Counter[bytes] = Counter()
    requests = []
    for ids in prompts:
        key = ids.astype(np.int64).tobytes()
        digest = hashlib.sha256(key + seen[key].to_bytes(8, "little")).digest()
        seen[key] += 1
        requests.append(Request(ids, n, document=int.from_bytes(digest[:8], "little") >> 1))
    return requests


def score_file(checkpoint: Path, pairs: Path, out: Path) -> None:
    """Write `{"prefix_ids", "suffix_ids", "logprobs", "logprob"}` for each pair, in order.

    Raises:
        RequestError, DataError, CheckpointError: naming the line; nothing is written then.
    """
    check_writable(out)
    rows = _read_rows(pairs)
    policy = load_policy(checkpoint)
    encode = _encoder(policy, pairs)
    packed = []
    for number, row in rows:
        prefix = encode(number, row, "prefix", bos=True)
        suffix = encode(number, row, "suffix", bos=False)
        if len(prefix) + len(suffix) > policy.max_context:
            raise RequestError(
                f"{pairs}:{number}: {len(prefix)} + {len(suffix)} tokens exceed the model's context of "
                f"{policy.max_context}; shorten the prefix"
            )
        packed.append(Row(prefix, (suffix,)))
    logprobs: list[np.ndarray] = []
    groups = split_by_tokens([row.num_tokens for row in packed], policy.micro_batch_tokens)
    with steps("score", len(groups)) as bar:
        for group in groups:
            logprobs.extend(found.logprobs for (found,) in policy.score_rows([packed[i] for i in group]))
            bar.advance({"pairs": len(logprobs)})
    write_jsonl(
        out,
        (
            {
                "prefix_ids": row.prefix.tolist(),
                "suffix_ids": row.suffixes[0].tolist(),
                "logprobs": [float(x) for x in values],
                "logprob": float(values.astype(np.float64).sum()),
            }
            for row, values in zip(packed, logprobs, strict=True)
        ),
    )
    console.print(f"{len(packed)} pairs -> {out}")


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = list(read_jsonl(path))
    if not rows:
        raise DataError(f"{path}: no rows; write one JSON object a line")
    return rows


def _encoder(policy: FrozenPolicy, path: Path) -> Callable[..., np.ndarray]:
    def encode(number: int, row: dict[str, Any], name: str, *, bos: bool) -> np.ndarray:
        """Token ids of `name` (text, begun as the model begins one) or `name`_ids (taken as they are)."""
        where = f"{path}:{number}"
        given = [key for key in (name, f"{name}_ids") if key in row]
        if len(given) != 1:
            raise DataError(f'{where}: needs either "{name}" or "{name}_ids", has {sorted(row)}')
        value = row[given[0]]
        if given[0] == name:
            if not isinstance(value, str):
                raise DataError(f'{where}: "{name}" is a {type(value).__name__}; write text in quotes')
            try:
                ids = (encode_prompt if bos else _encode)(policy.tokenizer, value)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
        else:
            if not isinstance(value, list) or not all(type(x) is int for x in value):
                raise DataError(f'{where}: "{name}_ids" must be a list of integers')
            bad = [x for x in value if not 0 <= x < policy.tokenizer.vocab_size]
            if bad:
                raise RequestError(
                    f"{where}: token id {bad[0]} is outside the vocabulary of {policy.tokenizer.vocab_size}; "
                    "encode it with this model's tokenizer"
                )
            ids = np.asarray(value, dtype=np.int32)
        if len(ids) == 0:
            raise RequestError(f'{where}: "{given[0]}" is empty; give at least one token')
        return ids

    return encode


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode(text)
