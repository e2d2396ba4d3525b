"""Replies of a server kept on disk, so that the same request is paid for once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from sip_engine.utils.errors import DataError
from sip_engine.utils.files import check_writable
from sip_engine.utils.progress import console

_APPLICATION_ID = 0x51BE7A11
_WAIT_SECONDS = 60.0


def request_key(url: str, body: Mapping[str, Any], seed: int) -> str:
    """SHA-256 of what decides over a reply: endpoint, whole request body (with its model), seed.

    The seed counts even where the body does not carry it, so that votes stay apart.
    """
    parts = json.dumps([url, body, seed], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def _checksum(key: str, reply: str) -> int:
    return zlib.crc32((key + reply).encode("utf-8", "surrogatepass"))


class ReplyCache:
    """A SQLite file of reply texts by `request_key`; several processes may use it at once.

    A reply carries a checksum, which SQLite's pages do not; one that does not fit it is asked for again.

    A thread writes replies as soon as they come, those of the meantime in one transaction, so that a process that is
    killed loses no more than the disk was still writing. When the file stops working in mid-run (full disk, damage),
    that is said once and the run goes on without it. Locks must work where it lies: a local disk, or a network file
    system with POSIX locks.
    """

    def __init__(self, path: Path) -> None:
        """Open, or make, the file at `path`.

        Raises:
            DataError: it cannot be written, or is something else or damaged.
        """
        self._path = path
        self._new: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._writer: threading.Thread | None = None
        self._in_use = threading.Lock()
        self._failed = False
        self._db: sqlite3.Connection | None = None
        check_writable(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._prepare(self._db)
        except (sqlite3.Error, OSError) as error:
            if self._db is not None:
                self._db.close()
            raise DataError(
                f"{path}: not a usable cache of replies ({error}); remove the file, or choose another path"
            ) from None

    def _prepare(self, db: sqlite3.Connection) -> None:
        # In this order: another process may be making the file, and makes both at once.
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (ours,) = db.execute("PRAGMA application_id").fetchone()
        if ours != _APPLICATION_ID and tables:
            raise sqlite3.DatabaseError("it is a database of another program")
        if ours != _APPLICATION_ID:
            db.execute("BEGIN IMMEDIATE")
            db.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT, checksum INTEGER) "
                "WITHOUT ROWID"
            )
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute("COMMIT")
        if "checksum" not in {column[1] for column in db.execute("PRAGMA table_info(replies)")}:
            self._add_checksums(db)
        db.execute("SELECT key, reply, checksum FROM replies LIMIT 1").fetchone()

    def _add_checksums(self, db: sqlite3.Connection) -> None:
        """A file of before: replies that are there are believed as they are."""
        # Another process may be faster; what else is wrong shows in the query after this.
        with suppress(sqlite3.OperationalError):
            db.execute("ALTER TABLE replies ADD COLUMN checksum INTEGER")

    def __enter__(self) -> ReplyCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what is new and close the file."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._db is not None:
            self._db.close()
            self._db = None

    @property
    def failed(self) -> bool:
        """Whether the file stopped working while it was open."""
        return self._failed

    def get(self, key: str) -> str | None:
        """The reply to a request, if it is kept."""
        with self._in_use:
            if self._db is None:
                return None
            try:
                row = self._db.execute("SELECT reply, checksum FROM replies WHERE key = ?", (key,)).fetchone()
            except sqlite3.Error as error:
                self._give_up(error)
                return None
        if not row or not isinstance(row[0], str):
            return None
        return row[0] if row[1] in (None, _checksum(key, row[0])) else None

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; one already there is replaced."""
        with self._changed:
            self._new.append((key, reply))
            self._changed.notify()
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="replies", daemon=True)
            self._writer.start()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._closing)
                rows, self._new = self._new, []
            if not rows:
                return
            with self._in_use:
                self._insert([(key, reply, _checksum(key, reply)) for key, reply in rows])

    def _insert(self, rows: list[tuple[str, str, int]]) -> None:
        if self._db is None:
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", rows)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> None:
        db, self._db, self._failed = self._db, None, True
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()
        console.print(
            f"{self._path}: the cache of replies fails ({error}); going on without it. Remove the file if it "
            "is damaged.",
            soft_wrap=True,
            markup=False,
        )
