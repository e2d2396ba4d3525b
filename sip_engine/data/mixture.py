"""A mixture of sources by weight: which of them gives the sample at a position, in O(1), until they are used up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sip_engine.data.permutation import Permutation
from sip_engine.data.stream import SampleStream
from sip_engine.types import Sample
from sip_engine.utils.errors import CheckpointError, ConfigError, DataError

CYCLE = 4096
"""Samples within which every source has its exact share."""


@dataclass(frozen=True)
class Source:
    """One part of a mixture."""

    name: str
    stream: SampleStream
    weight: float
    """Its share of the samples, against the other sources'."""
    epochs: float | None = None
    """Most passes over it; None: as many as its weight asks for."""


@dataclass(frozen=True)
class _Phase:
    """Positions from `start` on in which no source is used up; `counts` of a cycle, `used` samples before."""

    start: int
    counts: np.ndarray
    used: np.ndarray


class MixtureStream:
    """Like `SampleStream`, over several: cycles of 4096 samples hold each source in proportion, in a random order.

    A source that has given all its epochs is left out from then on; the others keep their proportions.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        """Raises ConfigError where no source has a weight."""
        self.position = 0
        self._sources, self._seed = list(sources), seed
        self._phases, self.num_positions = _phases(sources)
        """Positions until all sources are used up; None: there is no end."""

    def next_batch(self, batch_size: int, rank: int = 0, num_ranks: int = 1) -> list[Sample]:
        """As `SampleStream.next_batch`."""
        places = np.arange(rank, batch_size, num_ranks, dtype=np.int64)
        batch = self._samples(self.position + places)
        self.position += batch_size
        return batch

    def samples_at(self, position: int, count: int) -> list[Sample]:
        """Samples `position` to `position + count` of the sequence; changes nothing."""
        return self._samples(np.arange(position, position + count, dtype=np.int64))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on here; plain JSON values."""
        return {"position": self.position, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. Raises CheckpointError if its order of samples is another."""
        saved, current = state.get("order", {}), self._order()
        for name in sorted(saved.keys() | current.keys()):
            if saved.get(name) != current.get(name):
                raise CheckpointError(
                    f"the checkpoint's mixture has {name} {saved.get(name)} but this run has {current.get(name)}; "
                    "resume with the data settings of the checkpoint or start the data anew"
                )
        self.position = int(state["position"])

    def _order(self) -> dict[str, Any]:
        sources = {
            f"source {source.name}": {
                "weight": source.weight,
                "epochs": source.epochs,
                **source.stream.state_dict()["order"],
            }
            for source in self._sources
        }
        return {"seed": self._seed, **sources}

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the source [n] and position in its own stream [n] of positions [n]. DataError at the end."""
        if self.num_positions is not None and positions.max(initial=0) >= self.num_positions:
            raise DataError(
                f"all sources are used up after {self.num_positions:,} samples: raise an epochs of data.sources"
            )
        chosen, places = np.empty_like(positions), np.empty_like(positions)
        starts = np.array([phase.start for phase in self._phases])
        numbers = np.searchsorted(starts, positions, side="right") - 1
        for number in np.unique(numbers).tolist():
            phase = self._phases[number]
            size, ends = int(phase.counts.sum()), np.cumsum(phase.counts)
            cycles, slots = np.divmod(positions - phase.start, size)
            for cycle in np.unique(cycles[numbers == number]).tolist():
                here = (numbers == number) & (cycles == cycle)
                drawn = Permutation(size, self._seed, number, cycle)(slots[here])
                sources = np.searchsorted(ends, drawn, side="right")
                chosen[here] = sources
                rank = drawn - (ends - phase.counts)[sources]
                places[here] = phase.used[sources] + cycle * phase.counts[sources] + rank
        return chosen, places

    def _samples(self, positions: np.ndarray) -> list[Sample]:
        chosen, places = self.locate(positions)
        samples: dict[int, Sample] = {}
        for number, source in enumerate(self._sources):
            mine = np.flatnonzero(chosen == number)
            mine = mine[np.argsort(places[mine], kind="stable")]
            found = source.stream.samples_of(places[mine])
            samples |= {i: replace(s, source=source.name) for i, s in zip(mine.tolist(), found, strict=True)}
        return [samples[i] for i in range(len(positions))]


def shares(weights: Sequence[float] | np.ndarray, total: int) -> np.ndarray:
    """`total` shared out by weight, by largest remainders; one at least to each that has a weight."""
    exact = np.asarray(weights, dtype=np.float64)
    if not exact.sum() > 0:
        raise ConfigError("data.sources: all weights are 0: give one a weight")
    is_given = exact > 0
    exact = exact / exact.sum() * total
    counts = np.where(is_given, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    for number in order[: max(0, total - int(counts.sum()))]:
        counts[number] += 1
    while counts.sum() > max(total, np.count_nonzero(counts)):
        counts[int(counts.argmax())] -= 1
    return counts


def _phases(sources: Sequence[Source]) -> tuple[list[_Phase], int | None]:
    no_end = np.iinfo(np.int64).max
    limits = np.array(
        [no_end if s.epochs is None else int(s.epochs * s.stream.num_samples) for s in sources],
        dtype=np.int64,
    )
    weights = np.array([source.weight for source in sources])
    used, start, phases = np.zeros(len(sources), dtype=np.int64), 0, []
    shares(weights, CYCLE)
    while (alive := (used < limits) & (weights > 0)).any():
        counts = shares(np.where(alive, weights, 0), CYCLE)
        if (limits[alive] == no_end).all():
            return [*phases, _Phase(start, counts, used.copy())], None
        whole = int(((limits - used)[alive] // counts[alive]).min())
        rest = np.minimum(counts, limits - used - whole * counts)
        for cycles, cycle in ((whole, counts), (1, rest)):
            if cycles:
                phases.append(_Phase(start, cycle, used.copy()))
                start += cycles * int(cycle.sum())
                used = used + cycles * cycle
    return phases, start
