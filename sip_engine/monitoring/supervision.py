"""What stands around a training run on each process: the watchdog, equal settings, and the crash bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata

import torch.distributed as dist

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.agreement import check_same_settings
from sip_engine.distributed.mesh import join_processes
from sip_engine.distributed.watchdog import Watchdog
from sip_engine.utils import heartbeat
from sip_engine.utils.crash import remove_crash, write_crash
from sip_engine.utils.errors import SipError
from sip_engine.utils.progress import console


@contextmanager
def supervised(cfg: RunConfig) -> Iterator[None]:
    """Join the processes if they have not met, and see to it that all of them end well, or soon and with a line.

    Raises:
        ConfigError: the processes do not find each other, or were started with different settings.
        PeerError: another process is gone; where that is not noticed by a collective, the process is ended.
    """
    timeout_s = cfg.faults.timeout_s
    heartbeat.enter("start", 0)
    join_processes(cfg.parallel.timeout_minutes, start_s=timeout_s)
    check_same_settings(
        {
            **cfg.model_dump(mode="json"),
            "out": str(cfg.out.absolute()),
            "version of sip-engine": metadata.version("sip-engine"),
            "version of torch": metadata.version("torch"),
        }
    )
    rank = dist.get_rank()
    if rank == 0:
        remove_crash(cfg.out)
    bundle = partial(write_crash, cfg.out, rank, key_names=cfg.key_names)
    with Watchdog(timeout_s, on_end=bundle) as watchdog:
        try:
            yield
        except SipError:
            raise
        except Exception as error:  # of a collective, where another process is gone; or our own mistake
            found = watchdog.explain(error)
            folder = bundle(str(found or error), error=error)
            if found is not None:
                raise found from error
            if folder is not None:
                console.print(f"rank {rank}: what is known of this crash is in {folder}", markup=False)
            raise
