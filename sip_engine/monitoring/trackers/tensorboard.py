"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from sip_engine.config.schema import RunConfig


class TensorBoard:
    """Scalars by their names."""

    def __init__(self, cfg: RunConfig, from_step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(cfg.out / "tensorboard"), purge_step=from_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


def open_tracker(cfg: RunConfig, from_step: int) -> TensorBoard:
    return TensorBoard(cfg, from_step)
