"""The table of tiles: read as it was written, refused with its line when it cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import DEVICE  # noqa: F401  (chooses the interpreter for the files that follow)

from sip_engine.kernels import _tiles
from sip_engine.kernels._logprob_triton import CHUNK_COLUMNS, CHUNK_ROWS, _dlogits_shape
from sip_engine.kernels._tiles import TABLE, Tile, TileKey, read_tiles, tile_of, tiles_as_text

HEAD = TABLE.read_text().splitlines()[0]


def test_the_table_in_the_tree_is_in_order_and_whole() -> None:
    assert tiles_as_text(read_tiles(TABLE)) == TABLE.read_text()
    assert tile_of("decode_suffix", 2, 128) == Tile(16, 32, 4, 5)
    assert tile_of("logprob_dlogits", 2) == Tile(128, 256, 16, 4, 64)
    for size in (2, 4):
        assert _dlogits_shape(CHUNK_ROWS, CHUNK_COLUMNS, size) == (CHUNK_ROWS, CHUNK_COLUMNS)


def test_the_sum_never_reads_past_the_chunk() -> None:
    """float32 sums take 128 rows of what was written 64 columns at a time."""
    assert _dlogits_shape(1, 65, 4) == (128, 128)
    assert _dlogits_shape(129, 129, 4) == (256, 256)


def test_another_table_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        (key, tile, "") for key, tile, _ in read_tiles(TABLE) if key != TileKey("decode_suffix", 128, 2)
    ]
    entries.append((TileKey("decode_suffix", 128, 2), Tile(16, 64, 8, 3), "H200 2027-01-01"))
    path = tmp_path / "tiles.csv"
    path.write_text(tiles_as_text(entries))
    monkeypatch.setenv("SIP_TILES", str(path))
    caches = (_tiles.tile_table, _tiles.tiles_of)
    try:
        for cached in caches:
            cached.cache_clear()
        assert tile_of("decode_suffix", 2, 128) == Tile(16, 64, 8, 3)
    finally:
        for cached in caches:
            cached.cache_clear()


@pytest.mark.parametrize(
    "line",
    [
        "prefill,128,2,0,128,48,0,8,5,x",  # 48 is no power of two
        "prefill,128,2,0,128,64,0,8,0,x",
        "prefill,128,2,0,128,64,0,eight,5,x",
        "prefill,128",
        "prefill,64,2,0,16,16,0,4,3,a\nprefill,64,2,0,16,32,0,4,3,b",
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tiles.csv"
    path.write_text(f"{HEAD}\n{line}\n")
    number = 2 + line.count("\n")
    with pytest.raises(ValueError, match=rf"tiles\.csv:{number}: "):
        read_tiles(path)
    with pytest.raises(ValueError, match=r"nothing\.csv: the table of tiles cannot be read"):
        read_tiles(tmp_path / "nothing.csv")
