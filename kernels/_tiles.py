"""The tuned constants of the kernels: one table, `tiles.csv`, read once when the first kernel is imported.

A row is one tile: which kernel, for heads of up to `head_dim` channels (0: no heads), elements of `element_bytes`,
and up to `rows` query rows (0: any number), with the block sizes, warps and pipeline stages it is launched with.
`chosen_by` is "compiler" where the compiler's report decided, or the GPU and date of a measurement. A result depends
on a tile by the order of its sums alone. `python -m benchmarks gpu --tune` writes the table anew.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).resolve().with_name("tiles.csv")
TABLE_SWITCH = "SIP_TILES"
"""Environment variable that names another table: `--tune` tries tiles with it before it writes any."""


@dataclass(frozen=True)
class Tile:
    """One tuned configuration of a kernel.

    In attention over pages a key's address needs its page number first, so half of the stages hide each of the two
    loads.
    """

    block_m: int
    """Rows of the output's tile: queries or tokens."""
    block_n: int
    """Keys a step, or columns of the output's tile."""
    num_warps: int
    num_stages: int
    block_k: int = 0
    """Inner length of a product's step; 0 in attention, where it is the head dim."""


class TileKey(NamedTuple):
    """What a tile is for; see the head of this file."""

    kernel: str
    head_dim: int = 0
    element_bytes: int = 2
    rows: int = 0


@cache
def tile_table() -> dict[TileKey, Tile]:
    """Every tile. ValueError, naming file and line, if the table cannot be used."""
    path = Path(os.environ.get(TABLE_SWITCH) or TABLE)
    return {key: tile for key, tile, _ in read_tiles(path)}


@cache
def tiles_of(kernel: str, element_bytes: int) -> dict[tuple[int, int], Tile]:
    """(head dim up to, query rows up to) -> tile, of one kernel and width of elements."""
    return {
        (key.head_dim, key.rows): tile
        for key, tile in tile_table().items()
        if key.kernel == kernel and key.element_bytes == element_bytes
    }


def tile_of(kernel: str, element_bytes: int, head_dim: int = 0) -> Tile:
    """The one tile of a kernel that does not depend on rows."""
    return tile_table()[TileKey(kernel, head_dim, element_bytes)]


def read_tiles(path: Path) -> list[tuple[TileKey, Tile, str]]:
    """Key, tile and who chose it, of each line. ValueError, naming file and line, if one cannot be used."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: the table of tiles cannot be read ({error.strerror})") from None
    found: dict[TileKey, tuple[TileKey, Tile, str]] = {}
    for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            key = TileKey(row["kernel"], *(int(row[name]) for name in TileKey._fields[1:]))
            tile = Tile(**{name: int(row[name]) for name in Tile.__dataclass_fields__})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a tile ({error}); see the columns of {TABLE}") from None
        sizes = (tile.block_m, tile.block_n, tile.num_warps, *([tile.block_k] if tile.block_k else []))
        if any(size < 1 or size & (size - 1) for size in sizes) or tile.num_stages < 1 or key in found:
            raise ValueError(
                f"{path}:{number}: blocks and warps must be powers of two, stages 1 or more, and no tile twice"
            )
        found[key] = (key, tile, row["chosen_by"] or "")
    return list(found.values())


def tiles_as_text(tiles: Iterable[tuple[TileKey, Tile, str]]) -> str:
    """The table as `read_tiles` takes it, in order."""
    names = [*TileKey._fields, "block_m", "block_n", "block_k", "num_warps", "num_stages", "chosen_by"]
    lines = [",".join(names)]
    for key, tile, chosen_by in sorted(tiles, key=lambda entry: entry[0]):
        values = key._asdict() | asdict(tile) | {"chosen_by": chosen_by}
        lines.append(",".join(str(values[name]) for name in names))
    return "\n".join(lines) + "\n"
