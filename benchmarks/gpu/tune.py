"""Other tiles for the kernels, measured one key of the table at a time; the best are written into `tiles.csv`.

A key is tried in a process of its own with a deadline, so that a tile that crashes costs that key alone. A tile
counts only if its results are as near to float64 as the kernel promises, and replaces the old one if 2 % faster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks.gpu.case import REAL, SMALL, TINY, KernelCase
from benchmarks.gpu.kernel_cases import kernel_cases
from benchmarks.gpu.machine import seconds_of
from benchmarks.gpu.runner import end_process, json_lines, own_folder
from benchmarks.gpu.worker import emulated
from benchmarks.record import ROOT
from sip_engine.kernels import _tiles
from sip_engine.kernels._tiles import TABLE, TABLE_SWITCH, Tile, TileKey, read_tiles, tiles_as_text
from sip_engine.utils.files import write_atomic

GAIN = 0.98
CASES = {
    TileKey("decode_prefix", 128, 2, 16): "decode",
    TileKey("decode_prefix", 128, 2, 64): "decode, 4 query heads a KV head",
    TileKey("decode_prefix", 128, 2, 128): "decode, 8 query heads a KV head",
    TileKey("decode_prefix", 64, 2, 16): "decode, heads of 64",
    TileKey("decode_suffix", 128): "decode",
    TileKey("decode_suffix", 64): "decode, heads of 64",
    TileKey("prefill", 128): "prefill, 2 query heads a KV head",
    TileKey("shared_prefix_forward", 128): "shared_prefix, forward and backward",
    TileKey("shared_prefix_dq", 128): "shared_prefix, forward and backward",
    TileKey("shared_prefix_dkv", 128): "shared_prefix, forward and backward",
    TileKey("logprob_stats"): "logprob, forward and backward",
    TileKey("logprob_dlogits"): "logprob, forward and backward",
    TileKey("logprob_sum"): "logprob, forward and backward",
    TileKey("head_sample"): "head and sample",
}
"""Key of the table -> the case that launches it most."""
REHEARSED = {TileKey("decode_suffix", 64, 4): "decode"}


def neighbours(key: TileKey, tile: Tile) -> Iterator[Tile]:
    """The tile, and those with one constant changed."""
    yield tile
    for stages in (tile.num_stages - 1, tile.num_stages + 1):
        if stages > 0:
            yield replace(tile, num_stages=stages)
    for warps in (tile.num_warps // 2, tile.num_warps * 2):
        if 2 <= warps <= 16:
            yield replace(tile, num_warps=warps)
    for block_n in (tile.block_n // 2, tile.block_n * 2):
        if 16 <= block_n <= 256:
            yield replace(tile, block_n=block_n)
    if not key.kernel.startswith("decode"):  # there the rows of a tile are what the key says
        for block_m in (tile.block_m // 2, tile.block_m * 2):
            if 64 <= block_m <= 256:
                yield replace(tile, block_m=block_m)


def tune(out: Path, minutes: float, *, rehearse: bool = False) -> int:
    """Try every key; write `out`/tiles.csv and, unless rehearsing, the table in the tree. 0 if any was tried."""
    with own_folder(out):
        return _tune(out, minutes, rehearse)


def _tune(out: Path, minutes: float, rehearse: bool) -> int:
    import torch

    keys, entries = (
        list(REHEARSED if rehearse else CASES),
        {key: (key, tile, by) for key, tile, by in read_tiles(TABLE)},
    )
    begun, tried = time.monotonic(), 0
    device = "rehearsal" if rehearse else torch.cuda.get_device_name()
    by = f"{device.replace(',', ' ')} {datetime.now(UTC):%Y-%m-%d}"
    for number, key in enumerate(keys):
        seconds = (60 * minutes - (time.monotonic() - begun)) / (len(keys) - number)
        found = _try(out, key, max(5.0, seconds), rehearse)
        if not found:
            print(f"{_name(key)}: nothing measured in {seconds:.0f} s; see {out}/tune.txt")
            continue
        tried += 1
        (old, before), *_ = found
        best, after = min(found, key=lambda entry: entry[1])
        kept = best if after <= GAIN * before else old
        print(f"{_name(key)}: {before * 1e6:.1f} us, best of {len(found)} {after * 1e6:.1f} us, {kept}")
        if kept != old:
            entries[key] = (key, kept, by)
    text = tiles_as_text(entries.values())
    write_atomic(out / TABLE.name, text)
    if not rehearse:
        write_atomic(TABLE, text)
        print(
            f"written: {TABLE}; run `python -m sip_engine.kernels.compile_report` and the tests before it is kept"
        )
    return 0 if tried else 1


def _name(key: TileKey) -> str:
    return " ".join(map(str, key))


def _try(out: Path, key: TileKey, seconds: float, rehearse: bool) -> list[tuple[Tile, float]]:
    """(tile, seconds) of those that ran and were right, the present one first; empty if that was not."""
    path = out / "tried.jsonl"
    path.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.tune",
        ",".join(map(str, key)),
        "--out",
        str(out.resolve()),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if rehearse else "0"}
    with (out / "tune.txt").open("ab") as log:
        process = psutil.Popen(
            [*command, *["--rehearse"] * rehearse], stdout=log, stderr=log, env=environment, cwd=ROOT
        )
        try:
            process.wait(seconds)
        except psutil.TimeoutExpired:
            pass
        finally:
            end_process(process)
    tried, _ = json_lines(path)  # the last may be cut off where the deadline came
    found = [(Tile(**entry["tile"]), entry["seconds"]) for entry in tried]
    return found if found and found[0][0] == _tiles.tile_table()[key] else []


def _case(sizes, name: str) -> KernelCase:
    return next(case for case in kernel_cases(sizes) if case.name == name)


def measure(key: TileKey, out: Path, rehearse: bool) -> None:
    """Time the tile in use and its neighbours, a line each as soon as it is known."""
    name = (REHEARSED if rehearse else CASES)[key]
    present, entries = _tiles.tile_table()[key], read_tiles(TABLE)
    table = out / "trying.csv"
    timed, checked = (_case(sizes, name) for sizes in ((TINY, TINY) if rehearse else (REAL, SMALL)))
    inputs, small = [timed.make(seed) for seed in range(2)], checked.make(0)
    exact = [x.double() for x in checked.exact(small)]
    os.environ[TABLE_SWITCH] = str(table)
    with (out / "tried.jsonl").open("w") as file:
        for tile in list(neighbours(key, present))[: 2 if rehearse else None]:
            table.write_text(tiles_as_text([(k, tile if k == key else t, by) for k, t, by in entries]))
            _tiles.tile_table.cache_clear()
            _tiles.tiles_of.cache_clear()
            try:
                found = checked.run(small)
                right = all(
                    (a.double() - b).abs().max() <= checked.error * b.abs().max()
                    for a, b in zip(found, exact, strict=True)
                )
                seconds = seconds_of([lambda i=i: timed.run(i) for i in inputs], graph="backward" not in name)
            except Exception as error:  # more shared memory than there is, a tile that does not compile
                print(f"{tile}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
                continue
            if right:
                print(json.dumps({"tile": vars(tile), "seconds": seconds}), file=file, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """One key, in this process."""
    from contextlib import nullcontext

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("key")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    kernel, *numbers = args.key.split(",")
    with emulated() if args.rehearse else nullcontext():
        measure(TileKey(kernel, *map(int, numbers)), args.out, args.rehearse)
    return 0


if __name__ == "__main__":
    sys.exit(main())
