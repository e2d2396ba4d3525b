"""The order in which training sees samples: random access, resumable, independent of the ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from sip_engine.data.permutation import Permutation
from sip_engine.data.samples import SampleIndex
from sip_engine.data.token_files import TokenFiles
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.types import Sample
from sip_engine.utils.errors import CheckpointError, DataError


class SampleStream:
    """An endless sequence of samples, shuffled anew in every epoch.

    Sample number `position` of the sequence depends on the data, the cut and the seed only; batch size
    and number of ranks merely divide the sequence. `position` counts the samples consumed by all ranks.
    """

    def __init__(self, token_files: TokenFiles, tokenizer: Tokenizer, index: SampleIndex) -> None:
        """index: made from `token_files.lengths`. Raises DataError if the parts do not belong together."""
        if token_files.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
            raise DataError(
                f"{token_files.prefix_path}: written by tokenizer {str(token_files.tokenizer_fingerprint)[:12]}, "
                f"not by {tokenizer.fingerprint[:12]}; build the token files with the tokenizer of the run"
            )
        if token_files.num_documents != index.num_documents:
            raise DataError(
                f"{token_files.prefix_path}: {token_files.num_documents} documents, but the index counts "
                f"{index.num_documents}; make the index from these files' lengths"
            )
        self.position = 0
        self._token_files = token_files
        self._tokenizer = tokenizer
        self._index = index

    def next_batch(self, batch_size: int, rank: int = 0, num_ranks: int = 1) -> list[Sample]:
        """This rank's share of the next `batch_size` samples: those whose place i has i % num_ranks == rank.

        Moves on by the whole batch, so that every rank that asks alike stays in step.
        """
        places = np.arange(rank, batch_size, num_ranks, dtype=np.int64)
        batch = self._samples(self.position + places)
        self.position += batch_size
        return batch

    def samples_at(self, position: int, count: int) -> list[Sample]:
        """Samples `position` to `position + count` of the sequence; changes nothing."""
        return self._samples(np.arange(position, position + count, dtype=np.int64))

    def samples_of(self, positions: np.ndarray) -> list[Sample]:
        """Samples at ascending positions [n] int64 of the sequence; changes nothing."""
        return self._samples(positions)

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return self._index.num_samples

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on here; plain JSON values."""
        return {"position": self.position, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. Raises CheckpointError if its order of samples is another."""
        saved, current = state.get("order"), self._order()
        saved = saved if isinstance(saved, dict) else {}
        for name, value in current.items():
            if saved.get(name) != value:
                raise CheckpointError(
                    f"the checkpoint's data order has {name} {saved.get(name)} but this run has {value}; "
                    "resume with the data settings of the checkpoint or start the data anew"
                )
        position = state.get("position")
        if type(position) is not int or position < 0:
            raise CheckpointError(f"the checkpoint's data position is {position!r}; copy the checkpoint anew")
        self.position = position

    def _order(self) -> dict[str, Any]:
        """All that decides which sample comes at which position."""
        return {
            "data": self._token_files.key,
            "seed": self._index.seed,
            "cut": self._index.cut,
            "suffix_tokens": self._index.suffix_tokens,
            "max_prefix_tokens": self._index.max_prefix_tokens,
            "min_prefix_tokens": self._index.min_prefix_tokens,
            "num_samples": self._index.num_samples,
            "cuts": self._index.fingerprint,
        }

    def _samples(self, positions: np.ndarray) -> list[Sample]:
        """Samples at ascending positions [n] int64, which may span several epochs."""
        epochs, places = np.divmod(positions, self._index.num_samples)
        samples: list[Sample] = []
        for epoch in np.unique(epochs).tolist():
            order = Permutation(self._index.num_samples, self._index.seed, epoch)
            documents, cuts = self._index.locate(order(places[epochs == epoch]), epoch)
            samples.extend(map(self._sample, documents.tolist(), cuts.tolist()))
        return samples

    def _sample(self, document: int, cut: int) -> Sample:
        start = self._index.prefix_start(cut)
        ids = self._token_files.tokens(document, start, cut + self._index.suffix_tokens)
        prefix_ids, suffix_ids = ids[: cut - start], ids[cut - start :]
        decode = self._tokenizer.decode
        return Sample(document, cut, prefix_ids, suffix_ids, decode(prefix_ids), decode(suffix_ids))
