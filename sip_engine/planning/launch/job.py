"""What a launch needs to know, checked, and the templates that make a script of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sip_engine.config.schema import RunConfig
from sip_engine.utils.errors import ConfigError

REQUEUE_CODE = 75
"""The exit code of a run that was preempted and has saved itself (EX_TEMPFAIL): start it again."""
UNHEALTHY_CODE = 71
"""The exit code of a job whose nodes failed their check (EX_OSERR): not started again by itself."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d\d):(\d\d)")


@dataclass(frozen=True)
class Job:
    """One run on a cluster; paths are those of the nodes, which share a file system."""

    cfg: RunConfig
    config: Path
    overrides: tuple[str, ...]
    nodes: int
    gpus: int
    name: str
    time: str = "24:00:00"
    signal_seconds: int = 600
    max_requeues: int = 100
    grace: int = 300
    """Seconds that the other nodes get to end when one has ended."""
    logs: Path = Path("logs")
    partition: str | None = None
    account: str | None = None
    cpus: int | None = None
    interface: str | None = None
    venv: Path | None = None
    container: str | None = None
    mounts: str | None = None
    spot: bool = False
    accelerator: str = "H100"
    program: str | None = None
    """What torchrun starts, as a shell would read it; None is `sip train` with the config and its overrides."""

    def check(self) -> None:
        """Raise ConfigError for what cannot be, before anything is written."""
        for option, value, least in (
            ("--nodes", self.nodes, 1),
            ("--gpus-per-node", self.gpus, 1),
            ("--signal-seconds", self.signal_seconds, 30),
            ("--max-requeues", self.max_requeues, 0),
        ):
            if value < least:
                raise ConfigError(f"{option} {value}: must be {least} or more")
        if self.cpus is not None and self.cpus < self.gpus:
            raise ConfigError(f"--cpus {self.cpus}: each of a node's {self.gpus} processes needs one or more")
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"--name {self.name!r}: letters, digits, '.', '_' and '-' only")
        if self.venv is not None and self.container is not None:
            raise ConfigError("--venv and --container: choose one")
        if self.mounts is not None and self.container is None:
            raise ConfigError("--mounts belongs to --container: add it, or leave out --mounts")
        if self.limit_seconds <= self.signal_seconds:
            raise ConfigError(
                f"--time {self.time}: must be longer than --signal-seconds {self.signal_seconds}, or the job is "
                "told to save as it starts"
            )
        processes, model = self.nodes * self.gpus, self.cfg.parallel.tensor * self.cfg.parallel.pipeline
        if processes % model:
            raise ConfigError(
                f"{processes} processes ({self.nodes} nodes of {self.gpus}) cannot hold parallel.tensor x "
                f"parallel.pipeline = {self.cfg.parallel.tensor} x {self.cfg.parallel.pipeline}: use a multiple of "
                f"{model}"
            )
        if self.cfg.batch_size < processes // model:
            raise ConfigError(
                f"batch_size={self.cfg.batch_size} is below the {processes // model} data-parallel processes; "
                "raise it or use fewer nodes"
            )

    @property
    def limit_seconds(self) -> int:
        """The time limit; ConfigError unless it is [days-]hours:minutes:seconds."""
        found = _TIME.fullmatch(self.time)
        if found is None:
            raise ConfigError(f"--time {self.time!r}: write [days-]hours:minutes:seconds, such as 24:00:00")
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    def render(self, template: str) -> str:
        """A template of this folder, filled. Every value that a shell will read is quoted."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=StrictUndefined,
        )
        quoted = {
            name: _quote(getattr(self, name))
            for name in ("config", "logs", "partition", "account", "interface", "venv", "container", "mounts")
        }
        plain = {
            name: getattr(self, name)
            for name in (
                "nodes", "gpus", "name", "time", "signal_seconds", "max_requeues", "grace", "cpus", "spot",
                "accelerator",
            )
        }  # fmt: skip
        return environment.get_template(template).render(
            **quoted,
            **plain,
            program=self.program or _train(self.config, self.overrides),
            tensor=self.cfg.parallel.tensor,
            requeue_code=REQUEUE_CODE,
            unhealthy_code=UNHEALTHY_CODE,
        )


def _train(config: Path, overrides: Sequence[str]) -> str:
    """`-m sip_engine train ...` in double quotes where needed: the line itself stands in single ones."""
    words = [str(config), *overrides]
    bad = [word for word in words if "'" in word or "\n" in word]
    if bad:
        raise ConfigError(
            f"{bad[0]!r}: a launch script cannot carry quotes or line ends in settings; put it into a file"
        )
    return " ".join(["-m", "sip_engine", "train", *(_double(word) for word in words)])


def _double(word: str) -> str:
    if shlex.quote(word) == word:
        return word
    escaped = re.sub(r'([\\"$`])', r"\\\1", word)
    return f'"{escaped}"'


def _quote(value: object) -> str | None:
    return None if value is None else shlex.quote(str(value))
