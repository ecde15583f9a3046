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
from importlib import resources
from typing import Any, TypeVar

import adbc_driver_manager
import adbc_driver_postgresql.dbapi
import pyarrow as pa
from adbc_driver_manager.dbapi import Connection, Cursor

from pipeline.stage.errors import (
    DatabaseBusy,
    DatabaseError,
    DatabaseUnreachable,
    SettingsError,
)

log = logging.getLogger("pipeline")
T = TypeVar("T")

NO_DATABASE = "none"  # PG_DSN=none: this machine has none and works from copied results

# kind of failure: (what libpq says, what was found, hint, may a retry help)
_CONNECT = [
    (r"Connection refused|No such file|not accepting|starting up|shutting down",
     "nothing that answers", "is the server running, and are host and port right?", True),
    (r"on socket .*Permission denied", "a socket that this user may not open",
     "the folder after host= needs x for the user that runs this", False),
    (r"translate host name", "a host name that does not resolve",
     "check the host; special characters in a password need percent-encoding in a URL", True),
    (r"timeout|timed out|unreachable|No route|closed the connection|reset by peer",
     "no answer in time", "check host, port and firewall", True),
    (r"too many|remaining connection slots", "no free connection slot", "try again later", True),
    (r"password authentication failed|no password supplied|pg_hba|authentication",
     "a server that refuses the login", "check user, password and pg_hba.conf", False),
    (r"SSL|TLS|certificate|sslmode", "no agreement on TLS",
     "check sslmode and sslrootcert", False),
    (r"database .* does not exist", "a server without that database",
     "check the name, after the last / of the URL; createdb makes one", False),
    (r"role .* does not exist", "a server without that role",
     "check the user, before the @ of the URL; createuser or python -m pipeline role-sql", False),
    (r"permission denied for database", "a role that may not connect",
     "GRANT CONNECT ON DATABASE ... TO ...", False),
]  # fmt: skip

# What the driver gives no SQLSTATE for, neither while rows stream in nor when the connection goes:
# words of libpq or the server, and the code that is meant. FATAL is how the server ends a session.
_WORDS = [
    (r"FATAL: |server closed the connection|no connection to the server|connection not open"
     r"|(?:receive data from|send data to) server|SSL SYSCALL|SSL connection has been closed"
     r"|connection has been reset|Connection (?:reset|timed out)", "08006"),
    (r"No space left on device|Disk quota exceeded", "53100"),
    (r"out of memory", "53200"),
    (r"could not serialize access|conflict with recovery", "40001"),
    (r"deadlock detected", "40P01"),
]  # fmt: skip
_LOST = re.compile(r"08(?!P01)|57P0[123]")  # 08P01 is a message that the server cannot read
_BUSY = ("40001", "40P01")  # rolled back for the sake of another transaction: it may work next time
# SQLSTATE: what was expected, what was found unless the server's own words say it, hint
_REFUSED = {
    "55P03": ("a lock on the table within lock_timeout_s", "another session that holds it",
              "see pg_stat_activity and pg_locks, or raise lock_timeout_s"),
    "42501": ("a role that may do this", "", "see 'Roles' in docs/operating.md"),
    "53100": ("free disk space on the database's server, which is not this machine's", "",
              "make room there, then run it again: nothing that was encoded is lost"),
    "53200": ("free memory on the database's server", "",
              "see its log; fewer connections or a lower work_mem there would help"),
    "57014": ("a statement that runs to its end", "",
              "Ctrl-C, an administrator or statement_timeout ended it; run it again"),
    "53400": ("a statement within the limits of the database's server", "",
              "raise that limit for the job's role, with ALTER ROLE ... SET"),
}  # fmt: skip


# what others write: (how it begins, what was found, hint)
_FORMS = [
    (r"['\"]", "one in quotation marks", "they are the shell's, no part of the value"),
    (r"postgres(ql)?\+\w+://", "SQLAlchemy's form, which names a driver",
     "begin it with postgresql:// and leave the rest as it is"),
    (r"jdbc:", "the form of JDBC", "write postgresql://user:password@host:port/database"),
]  # fmt: skip


def data_source_name() -> str:
    """PG_DSN; SettingsError where there is none, or one in another software's form."""
    dsn = os.environ.get("PG_DSN", "")
    if not dsn:
        raise SettingsError(
            "PG_DSN in the environment",
            "nothing",
            "",
            f"export PG_DSN=postgresql://user@host/db; where no database is, PG_DSN={NO_DATABASE}",
        )
    for pattern, found, hint in _FORMS:
        if re.match(pattern, dsn):
            raise SettingsError("PG_DSN: a URL that begins with postgresql://", found, "", hint)
    return dsn


@contextmanager
def connect(*, read_only: bool = False, repeatable: bool = False) -> Iterator[Connection]:
    """A connection to PG_DSN in one open transaction; rolled back unless the caller commits.

    Times are read and written as UTC. `repeatable` gives the whole transaction one snapshot.
    Raises DatabaseUnreachable when nothing answers, DatabaseError for what else is wrong.
    """
    with _opened(autocommit=False) as connection:
        with translated_errors(), connection.cursor() as cursor:
            level = "REPEATABLE READ" if repeatable else "READ COMMITTED"
            mode = "READ ONLY" if read_only else "READ WRITE"
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {level}, {mode}")
            cursor.execute("SET LOCAL TIME ZONE 'UTC'")
            cursor.execute("SET LOCAL datestyle = 'ISO, MDY'")
        yield connection


@contextmanager
def session() -> Iterator[Cursor]:
    """A cursor whose statements are a transaction each, as those with CONCURRENTLY must be.

    Raises as `connect`.
    """
    with _opened(autocommit=True) as connection, connection.cursor() as cursor:
        yield cursor


@contextmanager
def _opened(*, autocommit: bool) -> Iterator[Connection]:
    dsn = data_source_name()
    if dsn == NO_DATABASE:
        raise DatabaseUnreachable("a database", "PG_DSN=none, which says there is none here")
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    os.environ.setdefault("PGAPPNAME", "listing-vectors")
    connection = _open(dsn, autocommit)
    try:
        yield connection
    finally:
        try:
            connection.close()
        except adbc_driver_manager.Error:
            log.debug("the connection was already gone")


def _open(dsn: str, autocommit: bool) -> Connection:
    """Connect; what is raised was not raised from libpq's error, which may quote the password."""
    try:
        connection: Connection = adbc_driver_postgresql.dbapi.connect(dsn, autocommit=autocommit)
        return connection
    except (adbc_driver_manager.Error, UnicodeError) as error:
        failure = _connect_error(str(error))
    raise failure


@contextmanager
def translated_errors(where: str = "") -> Iterator[None]:
    """Turn the driver's errors into DatabaseError, one line each.

    DatabaseUnreachable: the connection is lost. DatabaseBusy: another transaction came first.
    """
    try:
        yield
    except adbc_driver_manager.Error as error:
        raise _query_error(str(error), error.sqlstate or "", where) from None
    except (OSError, pa.ArrowException) as error:  # what Arrow makes of an error amid a stream
        if "[libpq]" not in str(error):
            raise
        raise _query_error(str(error), "", where) from None


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


def _query_error(text: str, state: str, where: str) -> DatabaseError:
    text = text.split("\nLINE ")[0].split("\n\nQuery was")[0]
    message = re.sub(r"^.*?(?:ERROR|FATAL):\s+", "", text, flags=re.S).splitlines()[0]
    message = re.sub(r"\s*SQLSTATE: \w+$|^[A-Z_]+: (?:\[libpq\] )?", "", message)
    state = state or next((code for words, code in _WORDS if re.search(words, text)), "")
    if _LOST.match(state):
        return DatabaseUnreachable("an answer from the database", message, where)
    if state in _BUSY:
        return DatabaseBusy("a transaction that no other disturbs", message, where, "run it again")
    if state in _REFUSED:
        expected, found, hint = _REFUSED[state]
        return DatabaseError(expected, found or message, where, hint)
    return DatabaseError("a statement that Postgres can run", message, where)


def fetch(
    cursor: Cursor, sql: str, parameters: tuple[Any, ...] | None = None
) -> list[tuple[Any, ...]]:
    """All rows of a small result."""
    with translated_errors():
        cursor.execute(sql, parameters)
        return list(cursor.fetchall())


def described(cursor: Cursor) -> str:
    """Which database this is, as the server says: nothing of PG_DSN."""
    name, where = fetch(
        cursor,
        "SELECT current_database()::text,"
        " coalesce(host(inet_server_addr()) || ':' || inet_server_port(), 'a local socket')",
    )[0]
    return f"{name} at {where}"


def bind(cursor: Cursor, values: Mapping[str, object]) -> None:
    """Make values readable in SQL as current_setting('listing_vectors.<name>').

    The bulk reads go through COPY, which takes no parameters; this binds them all the same, so
    that no value is ever spliced into a statement.
    """
    for name, value in values.items():
        fetch(
            cursor,
            "SELECT length(set_config($1, $2, true))",  # it may be megabytes: not back again
            (f"listing_vectors.{name}", str(value)),
        )


def run_script(cursor: Cursor, script: str, names: Mapping[str, str]) -> None:
    """Run a .sql file of this folder; `names` are its tables, quoted."""
    text = resources.files("pipeline.database").joinpath(script).read_text()
    for statement in text.format(**names).split(";\n"):
        if statement.strip():
            with translated_errors(script):
                cursor.execute(statement)


def set_lock_timeout(cursor: Cursor, seconds: int) -> None:
    """Wait no longer than this for a lock, until the transaction ends."""
    fetch(cursor, "SELECT set_config('lock_timeout', $1, true)", (f"{seconds}s",))


def sort_in_memory(cursor: Cursor) -> None:
    """Give each sort and hash of this transaction 256 MB of the server's memory instead of 4.

    With 4, what a million pending listings cost to sort grows faster than their number.
    """
    fetch(cursor, "SELECT set_config('work_mem', '256MB', true)")


def quoted(name: tuple[str, str]) -> str:
    """A schema-qualified, quoted identifier. Settings admits only [A-Za-z0-9_] in its parts."""
    return ".".join(f'"{part}"' for part in name)


def retrying(action: Callable[[], T], attempts: int = 4) -> T:
    """Run an action that is safe to repeat; wait 1, 2, 4 s after it was cut off or disturbed."""
    for attempt in range(1, attempts):
        try:
            return action()
        except (DatabaseUnreachable, DatabaseBusy) as error:
            log.warning("%s; attempt %d of %d failed, trying again", error, attempt, attempts)
            time.sleep(2 ** (attempt - 1))
    return action()
