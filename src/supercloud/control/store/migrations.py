"""The schema of the SQLite store, as the scripts that lead from each version to the next."""

import sqlite3
from collections.abc import Sequence

from supercloud.model.errors import Permanent

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE rows (
        key TEXT PRIMARY KEY, value BLOB NOT NULL, version INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE counter (revision INTEGER NOT NULL);
    INSERT INTO counter VALUES (0);
    """,
)
"""Script n leads from version n to n + 1. Never edit one that was released: add another."""


def migrate(connection: sqlite3.Connection, scripts: Sequence[str] = MIGRATIONS) -> None:
    """Bring the database to version ``len(scripts)``, each step in a transaction of its own.

    Raises Permanent when a newer release wrote it.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(scripts):
        raise Permanent(
            f"the state is of version {version}, this release knows up to {len(scripts)}"
        )
    for number, script in enumerate(scripts[version:], start=version + 1):
        connection.executescript(
            f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;"
        )
