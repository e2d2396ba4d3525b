"""Two nodes with addresses of their own; the line between them is cut, and the job goes on when it is back.

The nodes are network namespaces joined by a pair of virtual devices: processes of one reach the other by its address
only. The file system is shared, as on a cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import metrics, saved, start, wait

from sip_engine.monitoring.sessions import read_sessions
from sip_engine.monitoring.timeline import read_timeline

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # TEST-NET-1, RFC 5737: nobody's
DEVICE = "node"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces are made by root, with iproute2",
    ),
]


def ip(*args: str, check: bool = True) -> None:
    subprocess.run(["ip", *args], check=check, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Names of two namespaces with a device each, joined, up."""
    names = [f"sip-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            DEVICE,
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            DEVICE,
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/30", "dev", DEVICE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", DEVICE, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def test_a_node_is_cut_off_and_the_requeued_job_goes_on(nodes: list[str], tmp_path: Path) -> None:
    within = [["ip", "netns", "exec", name] for name in nodes]
    meeting = {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": DEVICE}
    options = ("--faults.timeout_s", "40", "--checkpoint.every", "1", "--eval.generate", "false")

    def job(fault: str = "") -> list:
        return wait(
            start(tmp_path, *options, ranks=2, port=29500, within=within, environment=meeting, fault=fault)
        )

    ended = job(f"at=generate step=2 rank=1 do=cut={DEVICE}")
    for rank, one in enumerate(ended):
        assert one.code == 8 and "Traceback" not in one.said, one
        assert f"this is rank {rank} in step" in one.said and f"rank {1 - rank}" in one.said, one.said
    assert saved(tmp_path) == [1]
    ip("-n", nodes[1], "link", "set", DEVICE, "up")
    for one in job():
        assert one.code == 0, one.said
    assert saved(tmp_path)[-1] == 3 and [row["step"] for row in metrics(tmp_path) if "loss" in row] == [
        1,
        2,
        3,
    ]
    first, second = read_sessions(tmp_path / "run")
    assert first.how != "finished" and (second.from_step, second.how) == (1, "finished")
    assert [one.rank for one in read_timeline(tmp_path / "run")] == [0, 1]
