"""lm-eval's language-model interface served by the engine: its own scorer and its own sampler.

`HarnessModel` needs nothing of lm-eval; `run_tasks` makes an `lm_eval.api.model.LM` of it and runs tasks.
Requests are lm-eval's `Instance`s, of which only `args` is read.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence, Sized
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.rows import Row
from sip_engine.sampler.frozen import FrozenPolicy, encode_continuation, encode_prompt, fit_prefix
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.utils.errors import ConfigError, DataError, RequestError, SipError
from sip_engine.utils.progress import Steps, steps

_CHUNK = 256
_MAX_GEN_TOKENS = 256


class Instance(Protocol):
    """What is read of an lm-eval request."""

    @property
    def args(self) -> tuple: ...


class HarnessModel:
    """The methods of `lm_eval.api.model.LM` over a frozen policy.

    Every text begins with bos, as training documents do. A text beyond the context loses its first tokens.
    """

    def __init__(self, policy: FrozenPolicy, sampler: Sampler) -> None:
        self.policy, self.sampler = policy, sampler

    def loglikelihood(self, requests: Sequence[Instance], **_: Any) -> list[tuple[float, bool]]:
        """(log-prob in nats, whether greedy decoding writes it) of each (context, continuation).

        Continuations of one context are suffixes of one row, so that a question is read once for all its answers.

        Raises:
            RequestError: a continuation is empty or longer than the context.
        """
        by_prefix: dict[bytes, list[int]] = defaultdict(list)
        prefixes: dict[bytes, np.ndarray] = {}
        suffixes: list[np.ndarray] = []
        for number, request in enumerate(requests):
            context, continuation = _with_spaces_behind(*request.args)
            suffix = encode_continuation(self.policy.tokenizer, context, continuation)
            if len(suffix) == 0:
                raise RequestError(f"request {number}: the continuation is empty; give it at least one token")
            prefix = encode_prompt(self.policy.tokenizer, context)
            prefix = fit_prefix(
                prefix, len(suffix), self.policy.max_context, f"request {number}: a continuation"
            )
            by_prefix[prefix.tobytes()].append(number)
            prefixes[prefix.tobytes()] = prefix
            suffixes.append(suffix)
        rows = [Row(prefixes[key], tuple(suffixes[n] for n in numbers)) for key, numbers in by_prefix.items()]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        numbers = list(by_prefix.values())
        with self._progress("loglikelihood", _num_chunks(rows)) as bar:
            for first in range(0, len(rows), _CHUNK):
                scored = self.policy.score_rows(rows[first : first + _CHUNK], greedy=True)
                for members, found in zip(numbers[first : first + _CHUNK], scored, strict=True):
                    for number, one in zip(members, found, strict=True):
                        results[number] = (float(one.logprobs.sum(dtype=np.float64)), bool(one.is_greedy))
                bar.advance({"contexts": min(first + _CHUNK, len(rows))})
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], **_: Any) -> list[float]:
        """Log-prob in nats of each whole text, the first token given bos."""
        windows = [
            (number, row)
            for number, request in enumerate(requests)
            for row in self._windows(self.policy.tokenizer.encode(request.args[0]))
        ]
        totals = [0.0] * len(requests)
        with self._progress("loglikelihood_rolling", _num_chunks(windows)) as bar:
            for first in range(0, len(windows), _CHUNK):
                part = windows[first : first + _CHUNK]
                for (number, _row), (one,) in zip(
                    part, self.policy.score_rows([row for _, row in part]), strict=True
                ):
                    totals[number] += float(one.logprobs.sum(dtype=np.float64))
                bar.advance({"windows": first + len(part)})
        return totals

    def generate_until(self, requests: Sequence[Instance], **_: Any) -> list[str]:
        """A continuation of each (context, settings), cut before the first of the strings `until`.

        Read of the settings: `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_p`, `top_k`. Generation
        ends at end-of-document; the strings are cut off afterwards.
        """
        by_params: dict[SamplingParams, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_params[self._params(request.args[1])].append(number)
        texts = [""] * len(requests)
        with self._progress("generate_until", sum(map(_num_chunks, by_params.values()))) as bar:
            for params, members in by_params.items():
                for first in range(0, len(members), _CHUNK):
                    part = members[first : first + _CHUNK]
                    prompts = [self._prompt(requests[number].args[0], params) for number in part]
                    done = self.sampler.generate(
                        [Request(p, 1, document=number) for p, number in zip(prompts, part, strict=True)],
                        params,
                    )
                    for number, (completion,) in zip(part, done, strict=True):
                        text = self.policy.tokenizer.decode(completion.ids)
                        texts[number] = _cut(text, _until(requests[number].args[1]))
                    bar.advance({"texts": first + len(part)})
        return texts

    def _progress(self, title: str, num_chunks: int) -> AbstractContextManager[Steps]:
        return steps(title, num_chunks, quiet=not self.policy.mesh.is_main)

    def _prompt(self, context: str, params: SamplingParams) -> np.ndarray:
        ids = encode_prompt(self.policy.tokenizer, context)
        return fit_prefix(ids, params.max_new_tokens, self.policy.max_context, "max_gen_toks")

    def _params(self, settings: dict[str, Any]) -> SamplingParams:
        temperature = float(settings.get("temperature") or 0.0)
        greedy = not settings.get("do_sample", temperature > 0) or temperature == 0
        return SamplingParams(
            int(settings.get("max_gen_toks", min(_MAX_GEN_TOKENS, self.policy.max_context // 2))),
            temperature=1.0 if greedy else temperature,
            top_p=1.0 if greedy else float(settings.get("top_p", 1.0)),
            top_k=0 if greedy else int(settings.get("top_k", 0)),
            greedy=greedy,
            stop_ids=self.policy.tokenizer.eos_ids,
        )

    def _windows(self, ids: np.ndarray) -> list[Row]:
        """Rows that score every token once: the first from bos on, the last with as much before it as fits."""
        size = self.policy.max_context - 1  # tokens a row can score
        rows, done = [], 0
        while done < len(ids):
            part = ids[done : done + size]
            if done == 0:
                before = np.array([self.policy.tokenizer.bos_id], np.int32)
            else:
                before = ids[max(0, done - (self.policy.max_context - len(part))) : done]
            rows.append(Row(before, (part,)))
            done += len(part)
        return rows


def run_tasks(
    policy: FrozenPolicy,
    sampler: Sampler,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    task_path: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks; task -> metric -> figure, with lm-eval's own names (`acc,none`, `acc_stderr,none`, ...).

    Raises:
        ConfigError: see `check_harness`. DataError: a task is not known or its data cannot be had.
    """
    evaluator, manager, language_model = _import_harness()

    class EngineLM(HarnessModel, language_model):
        def __init__(self) -> None:
            language_model.__init__(self)
            HarnessModel.__init__(self, policy, sampler)

    try:
        found = evaluator.simple_evaluate(
            model=EngineLM(),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager(include_path=str(task_path) if task_path else None),
            log_samples=False,
            bootstrap_iters=1000,
        )
    except SipError:
        raise
    except Exception as error:  # lm-eval and datasets raise many types for one cause: data that cannot be had
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"--tasks {','.join(tasks)}: lm-eval failed ({type(error).__name__}: {reason}); check the names and "
            "that their data is here or can be downloaded"
        ) from error
    return {task: _numbers(figures.items()) for task, figures in found["results"].items()}


def check_harness(mesh: Mesh) -> None:
    """Raise ConfigError unless lm-eval can be imported and there is one model copy to ask."""
    if mesh.dp.size > 1:
        raise ConfigError(
            f"--tasks runs on one model copy, not {mesh.dp.size}: start one process, or give all of them to one "
            "with --tensor-parallel"
        )
    _import_harness()


def _import_harness() -> tuple[Any, Any, type]:
    """lm-eval's evaluator, task manager and model interface."""
    try:
        from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-eval, which cannot be imported ({error}): pip install lm-eval"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return evaluator, TaskManager, LM


def _with_spaces_behind(context: str, continuation: str) -> tuple[str, str]:
    """White space that ends a context is read with the continuation, as lm-eval's own models do."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _num_chunks(items: Sized) -> int:
    return -(-len(items) // _CHUNK)


def _numbers(items: Iterable[tuple[str, Any]]) -> dict[str, float]:
    return {name: float(value) for name, value in items if isinstance(value, int | float)}


def _until(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of some strings."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends, default=len(text))]
