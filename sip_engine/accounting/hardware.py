"""Rates of GPUs: the tables in the tree, and the measurements that take the place of their numbers."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sip_engine.kernels._gpus import MEASURED, RATES, gpu_of, load_gpus, newest
from sip_engine.utils.errors import ConfigError, DataError
from sip_engine.utils.regular import read_text

TABLE = Path(__file__).with_name("rates.toml")
"""What is around GPUs, and shares of their ceilings; the ceilings are a table of `kernels/`, which goes by it too."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Gpu(_Table):
    """One GPU and its links; units in the names (GiB are 2^30 bytes, TB, GB and TFLOP powers of ten)."""

    machine: str
    memory_gib: float = Field(gt=0)
    copy_tb_s: float = Field(gt=0)
    gemm_bf16_tflop_s: float = Field(gt=0)
    gemm_fp8_tflop_s: float = Field(ge=0)
    peak_bf16_tflop_s: float = Field(gt=0)
    link_gb_s: float = Field(gt=0)
    network_gb_s: float = Field(gt=0)
    host_gb_s: float = Field(gt=0)
    watts: float = Field(gt=0)
    gpus_per_node: int = Field(gt=0)


class Shares(_Table):
    """Share of a rate that each part of a step gets, in (0, 1]."""

    gemm: float = Field(gt=0, le=1)
    decode_weights: float = Field(gt=0, le=1)
    decode_attention: float = Field(gt=0, le=1)
    prefill_attention: float = Field(gt=0, le=1)
    train_attention_forward: float = Field(gt=0, le=1)
    train_attention_backward: float = Field(gt=0, le=1)
    log_prob_head: float = Field(gt=0, le=1)
    link: float = Field(gt=0, le=1)
    host: float = Field(gt=0, le=1)
    optimizer: float = Field(gt=0, le=1)
    judge_decode: float = Field(gt=0, le=1)
    judge_prefill: float = Field(gt=0, le=1)


class Overheads(_Table):
    """Time and memory that do not grow with the work; 0 is none."""

    graph_launch_us: float = Field(ge=0)
    eager_launch_us: float = Field(ge=0)
    decode_launches_per_layer: float = Field(ge=0)
    train_launches_per_layer: float = Field(ge=0)
    wave_s: float = Field(ge=0)
    collective_us: float = Field(ge=0)
    context_gib: float = Field(ge=0)
    nccl_gib: float = Field(ge=0)
    workspace_gib: float = Field(ge=0)
    storage_gb_s: float = Field(gt=0)


class JudgeModel(_Table):
    """A judge behind a server."""

    parameters: float = Field(gt=0)
    kv_bytes_per_token: float = Field(gt=0)
    gpus: int = Field(gt=0)
    """GPUs that hold one copy."""


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU with the shares and overheads to reckon with, and where measured numbers came from."""

    name: str
    gpu: Gpu
    shares: Shares
    overheads: Overheads
    measured: tuple[str, ...] = ()
    """Rates that a measurement gave."""

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.gpu.memory_gib * 2**30

    def copy(self, share: float) -> float:
        """Bytes a second."""
        return self.gpu.copy_tb_s * 1e12 * share

    def gemm(self, share: float, *, fp8: bool = False) -> float:
        """Operations a second; FP8 needs `gemm_fp8_tflop_s` above 0."""
        rate = self.gpu.gemm_fp8_tflop_s if fp8 else self.gpu.gemm_bf16_tflop_s
        return rate * 1e12 * share

    def link(self, group: int) -> float:
        """Bytes a second each way between `group` neighbouring GPUs: NVLink in a node, else the network."""
        rate = self.gpu.link_gb_s if group <= self.gpu.gpus_per_node else self.gpu.network_gb_s
        return rate * 1e9 * self.shares.link


def load_hardware(name: str, *, gpus_per_node: int | None = None, measured: Path = MEASURED) -> Hardware:
    """The table's GPU `name`, with the numbers that `measured` holds for it in their place.

    Raises:
        ConfigError: no such GPU, or a node of no GPUs. DataError: `measured` is damaged.
    """
    table = _read_table()
    gpus = table["gpus"]
    if name not in gpus:
        raise ConfigError(f"--gpu {name}: not in the table of rates; known: {', '.join(sorted(gpus))}")
    if gpus_per_node is not None and gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node {gpus_per_node}: must be 1 or more")
    ceilings = load_gpus()[name]
    gpu = {"machine": ceilings.machine, **{rate: getattr(ceilings, rate) for rate in RATES}, **gpus[name]}
    gpu |= {} if gpus_per_node is None else {"gpus_per_node": gpus_per_node}
    sections = {"gpu": gpu, "shares": dict(table["shares"]), "overheads": dict(table["overheads"])}
    found = _measurements(measured, ceilings.machine)
    for rate, value in found.items():
        home = next((section for section in sections.values() if rate in section and rate != "machine"), None)
        if home is None:
            raise DataError(
                f"{measured}: no rate is called {rate!r}; names are those of {TABLE.name} and gpus.toml"
            )
        home[rate] = value
    try:
        return Hardware(
            name,
            Gpu.model_validate(sections["gpu"]),
            Shares.model_validate(sections["shares"]),
            Overheads.model_validate(sections["overheads"]),
            tuple(sorted(found)),
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise DataError(f"{measured}: {fault['loc'][-1]}: {fault['msg']}") from None


def peak_bf16(device: str) -> float | None:
    """Operations a second of the table's GPU whose name stands in what a device calls itself; None if none does."""
    gpu = gpu_of(device)
    return None if gpu is None else gpu.peak_bf16_tflop_s * 1e12


def load_judge(name: str) -> JudgeModel:
    """A judge of the table; ConfigError if there is none of that name."""
    judges = _read_table()["judges"]
    if name not in judges:
        raise ConfigError(f"--judge {name}: not in the table of rates; known: {', '.join(sorted(judges))}")
    return JudgeModel.model_validate(judges[name])


def _read_table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def _measurements(path: Path, machine: str) -> dict[str, float]:
    """The newest value of each rate measured on a GPU whose name holds `machine`."""
    if not path.exists():
        return {}
    try:
        return newest(read_text(path), machine)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a CSV file of measured rates") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
