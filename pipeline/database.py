"""Connections to Postgres through ADBC, and what its errors mean to a user.

PG_DSN is read here and nowhere else. What libpq says about a failed connection can quote pieces
of it (a password with an unescaped '@' ends up in the host name), so those words are never
shown: a failure is named by its kind.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import adbc_driver_manager
import adbc_driver_postgresql.dbapi
from adbc_driver_manager.dbapi import Connection, Cursor

from pipeline.errors import DatabaseError, DatabaseUnreachable, SettingsError

log = logging.getLogger("pipeline")
T = TypeVar("T")

NO_DATABASE = "none"  # PG_DSN=none: this machine has none and works from copied results

# kind of failure: (what libpq says, what was found, hint, may a retry help)
_CONNECT = [
    (r"Connection refused|No such file|not accepting|starting up|shutting down",
     "nothing that answers", "is the server running, and are host and port right?", True),
    (r"translate host name", "a host name that does not resolve",
     "check the host; special characters in a password need percent-encoding in a URL", True),
    (r"timeout|timed out|unreachable|No route|closed the connection|reset by peer",
     "no answer in time", "check host, port and firewall", True),
    (r"too many|remaining connection slots", "no free connection slot", "try again later", True),
    (r"password authentication failed|no password supplied|pg_hba|authentication",
     "a server that refuses the login", "check user, password and pg_hba.conf", False),
    (r"SSL|TLS|certificate|sslmode", "no agreement on TLS",
     "check sslmode and sslrootcert", False),
    (r"database .* does not exist", "a server without that database", "check the name", False),
    (r"role .* does not exist", "a server without that role", "check the user", False),
    (r"permission denied for database", "a role that may not connect",
     "GRANT CONNECT ON DATABASE ... TO ...", False),
]  # fmt: skip

# SQLSTATE prefixes of faults of the moment: connection, serialization, deadlock, resources, restart
_TRANSIENT = ("08", "40", "53", "57P0")


@contextmanager
def connect(*, read_only: bool = False, repeatable: bool = False) -> Iterator[Connection]:
    """A connection to PG_DSN in one open transaction; rolled back unless the caller commits.

    Times are read and written as UTC. `repeatable` gives the whole transaction one snapshot.
    Raises DatabaseUnreachable when nothing answers, DatabaseError for what else is wrong.
    """
    dsn = os.environ.get("PG_DSN", "")
    if not dsn:
        raise SettingsError(
            "PG_DSN in the environment", "nothing", "", "export PG_DSN=postgresql://user@host/db"
        )
    if dsn == NO_DATABASE:
        raise DatabaseUnreachable("a database", "PG_DSN=none, which says there is none here")
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    os.environ.setdefault("PGAPPNAME", "listing-vectors")
    connection = _open(dsn)
    try:
        with translated_errors(), connection.cursor() as cursor:
            level = "REPEATABLE READ" if repeatable else "READ COMMITTED"
            mode = "READ ONLY" if read_only else "READ WRITE"
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {level}, {mode}")
            cursor.execute("SET LOCAL TIME ZONE 'UTC'")
            cursor.execute("SET LOCAL datestyle = 'ISO, MDY'")
        yield connection
    finally:
        try:
            connection.close()
        except adbc_driver_manager.Error:
            log.debug("the connection was already gone")


def _open(dsn: str) -> Connection:
    """Connect; what is raised was not raised from libpq's error, which may quote the password."""
    try:
        connection: Connection = adbc_driver_postgresql.dbapi.connect(dsn)
        return connection
    except (adbc_driver_manager.Error, UnicodeError) as error:
        failure = _connect_error(str(error))
    raise failure


@contextmanager
def translated_errors(where: str = "") -> Iterator[None]:
    """Turn the driver's errors into DatabaseError, one line each."""
    try:
        yield
    except adbc_driver_manager.Error as error:
        raise _query_error(error, where) from None


def _connect_error(text: str) -> DatabaseError:
    for pattern, found, hint, transient in _CONNECT:
        if re.search(pattern, text):
            kind = DatabaseUnreachable if transient else DatabaseError
            return kind("a connection to PG_DSN", found, "", hint)
    return DatabaseError(
        "PG_DSN: a Postgres connection string, URL or keyword=value form",
        "one that libpq cannot use",
        "",
        'special characters in a URL need percent-encoding; try: psql "$PG_DSN" -c "select 1"',
    )


def _query_error(error: adbc_driver_manager.Error, where: str) -> DatabaseError:
    state = error.sqlstate or ""
    text = str(error).split("\nLINE ")[0].split("\n\nQuery was")[0]
    message = re.sub(r"^.*?ERROR:\s*", "", text, flags=re.S).splitlines()[0]
    message = re.sub(r"\s*SQLSTATE: \w+$", "", message)
    if state == "55P03":
        return DatabaseError(
            "a lock on the table within lock_timeout_s",
            "another session that holds it",
            where,
            "see pg_stat_activity and pg_locks, or raise lock_timeout_s",
        )
    if state == "42501":
        return DatabaseError("a role that may do this", message, where, "see 'Roles' in the README")
    if state.startswith(_TRANSIENT) or not state:
        return DatabaseUnreachable("an answer from the database", message, where)
    return DatabaseError("a statement that Postgres can run", message, where)


def fetch(
    cursor: Cursor, sql: str, parameters: tuple[Any, ...] | None = None
) -> list[tuple[Any, ...]]:
    """All rows of a small result."""
    with translated_errors():
        cursor.execute(sql, parameters)
        return list(cursor.fetchall())


def bind(cursor: Cursor, values: Mapping[str, object]) -> None:
    """Make values readable in SQL as current_setting('listing_vectors.<name>').

    The bulk reads go through COPY, which takes no parameters; this binds them all the same, so
    that no value is ever spliced into a statement.
    """
    for name, value in values.items():
        fetch(cursor, "SELECT set_config($1, $2, true)", (f"listing_vectors.{name}", str(value)))


def quoted(name: tuple[str, str]) -> str:
    """A schema-qualified, quoted identifier. Settings admits only [A-Za-z0-9_] in its parts."""
    return ".".join(f'"{part}"' for part in name)


def retrying(action: Callable[[], T], attempts: int = 4) -> T:
    """Run an action that is safe to repeat; wait 1, 2, 4 s after faults of the moment."""
    for attempt in range(1, attempts):
        try:
            return action()
        except DatabaseUnreachable as error:
            log.warning("%s; attempt %d of %d failed, trying again", error, attempt, attempts)
            time.sleep(2 ** (attempt - 1))
    return action()
