"""What strangers upload, what a password may leak into, and what the job's role may do."""

import argparse
import base64
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from select import select
from typing import Any
from urllib.parse import quote

import adbc_driver_manager
import adbc_driver_postgresql.dbapi as adbc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    REPOSITORY,
    T0,
    Database,
    Run,
    Workspace,
    create_tables,
    new_environment,
    new_workspace,
)
from PIL import Image

from demo import postgres
from demo.encoder import random_encoder
from pipeline import load as stage
from pipeline.database import connection as connections
from pipeline.database import target
from pipeline.stage import parquet
from pipeline.stage.errors import MixedVectors, PipelineError, SettingsError
from pipeline.stage.settings import Environment, Settings
from pipeline.workflow import run

# --- hostile files, end to end

GOOD = (1, 2, 3)
ENCODER_DIM = 512


def hostile_files() -> list[Path]:
    folder = os.environ.get("LISTING_PHOTOS_DIR")
    if not folder:
        pytest.skip("LISTING_PHOTOS_DIR is not set")
    files = sorted(path for path in Path(folder, "hostile").glob("*/*") if path.is_file())
    return [path for path in files if path.parent.name != "LICENSES"]


def odd_paths(workspace: Workspace) -> dict[str, str]:
    """storage_path of what is no plain file below the root, or oddly named; and its outcome."""
    photos = workspace.photos
    (photos / "odd").mkdir()
    (photos / "odd/empty.jpg").touch()
    (photos / "odd/folder.jpg").mkdir()
    os.mkfifo(photos / "odd/fifo.jpg")
    (photos / "odd/dangling.jpg").symlink_to(photos / "odd/nothing.jpg")
    secret = workspace.folder / "secret.jpg"
    secret.write_bytes((photos / "1.jpg").read_bytes())
    (photos / "odd/out.jpg").symlink_to(secret)
    (photos / "up").symlink_to(workspace.folder)
    photo = (photos / "1.jpg").read_bytes()
    Path(os.fsdecode(os.fsencode(photos) + b"/odd/caf\xe9.jpg")).write_bytes(photo)
    names = [r"odd\back\slash.jpg", "odd/ lead and trail .jpg", "odd/new\nline.jpg", "odd/-rf",
             "odd/%s{input}$1;'\".jpg", "odd/\x1b[31mred\x07.jpg", "odd/日本語 é.jpg"]  # fmt: skip
    for name in names:
        (photos / name).write_bytes(photo)
    return dict.fromkeys(names, "") | {
        "odd/empty.jpg": "broken",
        "odd/folder.jpg": "unreadable",
        "odd/fifo.jpg": "unreadable",
        "odd/dangling.jpg": "outside",
        "odd/out.jpg": "outside",
        "up/secret.jpg": "outside",
        "/etc/hostname": "outside",
        str(secret): "outside",
        "../secret.jpg": "outside",
        "odd/../1.jpg": "outside",
        r"..\secret.jpg": "missing",
        "odd/caf\xe9.jpg": "missing",
        "x/" * 5000: "outside",
        "x" * 10_000: "outside",
        "": "outside",
        "odd/no such\nfile": "missing",
    }


def good_vectors(workspace: Workspace) -> dict[int, bytes]:
    """listing_id to the bytes of its vector, of the good listings in the aggregate."""
    table = pq.read_table(workspace.results / "aggregate/listing_vectors.parquet")
    rows = zip(table["listing_id"].to_pylist(), table["vec"].to_pylist(), strict=True)
    return {
        i: pa.array(vec, pa.float32()).buffers()[1].to_pybytes() for i, vec in rows if i in GOOD
    }


@pytest.mark.timeout(240)
def test_hostile_files_end_in_a_vector_or_an_error_and_change_no_other_vector(
    workspace: Workspace,
) -> None:
    """Each hostile file is a vector or an error in bounded time; good vectors keep every bit."""
    for listing, colour in zip(GOOD, ("red", "green", "blue"), strict=True):
        workspace.photo(f"{listing}.jpg", colour, (40 + 9 * listing, 37))
        workspace.database.add_listing(listing, [f"{listing}.jpg"])
    files = hostile_files()
    for file in files:
        shutil.copy(file, workspace.photos)
    expected = odd_paths(workspace)
    paths = [file.name for file in files] + list(expected)
    for listing, path in enumerate(paths, 100):
        workspace.database.add_listing(listing, [path])
    start = time.monotonic()
    workspace.run("vectors")
    seconds = time.monotonic() - start
    among_hostile = good_vectors(workspace)
    shard = pq.read_table(workspace.results / "encode/1-of-1.parquet")
    errors = dict(zip(shard["storage_path"].to_pylist(), shard["error"].to_pylist(), strict=True))
    vectors = dict(zip(shard["storage_path"].to_pylist(), shard["vec"].to_pylist(), strict=True))
    workspace.database.execute(
        'UPDATE "iPhone".iphone_listings SET spam = $1 WHERE listing_id >= 100', "x"
    )
    workspace.run("vectors", config={"cache_dir": "fresh"})

    assert {*paths, *(f"{i}.jpg" for i in GOOD)} == set(errors)
    assert all((errors[path] is None) != (vectors[path] is None) for path in errors)
    assert expected == {p: (errors[p] or "").partition(":")[0] for p in expected}
    assert among_hostile == good_vectors(workspace)
    assert set(GOOD) == set(among_hostile)
    assert seconds < 120


# --- never mix models

ENCODER = {
    "weights": "a" * 64,
    "architecture": "b" * 64,
    "transform": "c" * 16,
    "precision": "fp32",
    "decode": "full",
    "apply_exif_orientation": True,
}
REGISTRY = "ml.img_vec512_v1_encoders"


@dataclass
class Aggregate:
    """The files that the load reads, of one listing and an encoder."""

    folder: Path

    def load(self, listing: int = 1, **differing: Any) -> dict[str, Any]:
        """Write the files with an encoder that differs in these parts, and load them."""
        made_by = {
            "export": {"force": False},
            "select": {"topk": 5},
            "encoder": ENCODER | differing,
            "aggregate": {"source": "s", "model_rev": "m", "pca_rev": ""},
        }
        edited = datetime.fromisoformat(T0)
        key = {"generation": 1, "listing_id": listing, "edited_date": edited}
        vec = [1.0] + [0.0] * (ENCODER_DIM - 1)
        row = {**key, **made_by["aggregate"], "vec": vec, "n_images": 1}  # type: ignore[dict-item]
        args = argparse.Namespace(
            vectors=self.folder / "vectors.parquet", listings=self.folder / "listings.parquet",
            without_vector=self.folder / "without_vector.parquet",
            receipt=self.folder / "receipt.json",
        )  # fmt: skip
        for path, schema, rows in [
            (args.vectors, parquet.listing_vectors(ENCODER_DIM), [row]),
            (args.listings, parquet.LISTINGS, [key]),
            (args.without_vector, parquet.WITHOUT_VECTOR, []),
        ]:
            with parquet.writer(path, schema, made_by) as writer:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        chosen = Settings(cache_dir=str(self.folder / "cache"))
        return stage.load(args, chosen, Environment.read({}))


@pytest.fixture
def aggregate(tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch) -> Aggregate:
    monkeypatch.setenv("PG_DSN", database.dsn)
    return Aggregate(tmp_path)


@pytest.mark.parametrize(
    ("part", "value"),
    [("precision", "fp16"), ("decode", "scaled"), ("apply_exif_orientation", False)],
)
def test_last_digit_settings_load_and_are_reported(
    aggregate: Aggregate,
    database: Database,
    caplog: pytest.LogCaptureFixture,
    part: str,
    value: Any,
) -> None:
    """Vectors of another precision, decode mode or orientation load; log and registry say so."""
    aggregate.load(1)
    receipt = aggregate.load(2, **{part: value})
    registered = database.execute(f"SELECT encoder->>$1 FROM {REGISTRY}", part)

    assert f"this key's encoder or recipe changes in {part}" in caplog.text
    assert value == receipt["encoder"][part]
    assert [(json.dumps(value).strip('"'),)] == registered
    assert [1, 2] == [row[0] for row in database.vectors()]


def test_the_load_makes_a_missing_registry_where_it_may(
    aggregate: Aggregate, database: Database
) -> None:
    """A table from before the registry gets one at the first load, and is guarded from then on."""
    database.execute(f"DROP TABLE {REGISTRY}")
    aggregate.load(1)

    assert [("s", "m", "")] == database.execute(
        f"SELECT source, model_rev, pca_rev FROM {REGISTRY}"
    )
    with pytest.raises(MixedVectors):
        aggregate.load(2, weights="other")


def test_two_first_loads_at_once_cannot_mix_two_models(
    aggregate: Aggregate, database: Database
) -> None:
    """A load that waits for the first one under its key sees the encoder which that one leaves."""
    aggregate.load(1)
    database.execute(f"DELETE FROM {REGISTRY}")
    refused: list[str] = []

    def second() -> None:
        try:
            aggregate.load(2)
        except MixedVectors as error:
            refused.append(str(error))

    with connections.connect() as first:
        with first.cursor() as cursor:
            cursor.execute(
                f"INSERT INTO {REGISTRY} VALUES ('s', 'm', '', $1::text::jsonb)",
                (json.dumps(ENCODER | {"weights": "other"}),),
            )
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(1.0)
        waited = thread.is_alive()
        first.commit()
    thread.join(30)

    assert waited
    assert 1 == len(refused)
    assert [1] == [row[0] for row in database.vectors()]


# --- a server that lets in nothing but TLS and passwords, and the role that the README gives

PIECES = ["Kw7zRq5xA", "Lm3pVt9hB", "Bn2cGd6fC", "Sj4kYw8vD", "Hx1tPz6mE", "Xc3rNq9bF", "Tg5dMk2sG"]
PASSWORD = "{}@ss/w:{}%41{}#?&={} '{}\"{}\\{}".format(*PIECES)
ROLE = "nightly"
MARKET = "market"


@dataclass
class TlsDoor:
    """A TLS-only entrance to a server that has none of its own, like a pooler's or a cloud's.

    Who does not ask for TLS is sent away with the words of a pg_hba.conf of hostssl lines.
    """

    server: Path
    context: ssl.SSLContext
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    guests: int = 0

    SSL_REQUEST = bytes.fromhex("0000000804d2162f")
    REFUSAL = b'SFATAL\0C28000\0Mno pg_hba.conf entry for host "127.0.0.1", no encryption\0\0'

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def open(self) -> None:
        """Let guests in until the listener is closed."""
        while True:
            try:
                guest, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._admit, args=(guest,), daemon=True).start()

    def _admit(self, guest: socket.socket) -> None:
        with closing(guest):
            if guest.recv(8, socket.MSG_WAITALL) != self.SSL_REQUEST:
                guest.sendall(b"E" + (len(self.REFUSAL) + 4).to_bytes(4) + self.REFUSAL)
                return
            guest.sendall(b"S")
            try:
                with self.context.wrap_socket(guest, server_side=True) as secure:
                    self.guests += 1
                    with socket.socket(socket.AF_UNIX) as inside:
                        inside.connect(str(self.server / postgres.SOCKET))
                        _pass_on(secure, inside)
            except OSError:
                return


def _pass_on(secure: ssl.SSLSocket, inside: socket.socket) -> None:
    while True:
        ready = [secure] if secure.pending() else select([secure, inside], [], [])[0]
        for end in ready:
            data = end.recv(65536)
            if not data:
                return
            (inside if end is secure else secure).sendall(data)


@dataclass
class Guarded:
    """A database behind TLS and a password, with the job's role; `owner` needs neither."""

    door: TlsDoor
    owner: Database
    certificate: Path

    def url(self, password: str = PASSWORD, options: str = "") -> str:
        """PG_DSN as a URL that checks the server's certificate and name."""
        secure = f"sslmode=verify-full&sslrootcert={quote(str(self.certificate), safe='')}"
        return (
            f"postgresql://{ROLE}:{quote(password, safe='')}@localhost:{self.door.port}/{MARKET}"
            f"?{options or secure}"
        )

    def keywords(self, sslmode: str = "require", password: str = PASSWORD) -> str:
        """PG_DSN as keyword=value pairs."""
        escaped = password.replace("\\", "\\\\").replace("'", "\\'")
        return (
            f"host=127.0.0.1 port={self.door.port} dbname={MARKET} user={ROLE}"
            f" password='{escaped}' sslmode={sslmode}"
        )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The guarded server with the job's tables and the role of role.sql."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "server.crt", folder / "server.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = tmp_path_factory.mktemp("guarded")
    with postgres.embedded_postgres(server):
        owner = Database(postgres.create_database(server, MARKET))
        create_tables(owner)
        sql = subprocess.run(
            [sys.executable, "-m", "pipeline", "role-sql", "--role", ROLE],
            env=new_environment(owner.dsn), check=True, capture_output=True,
        ).stdout  # fmt: skip
        psql = [str(postgres.binary("psql")), owner.dsn, "-v", "ON_ERROR_STOP=1", "-q"]
        subprocess.run(psql, input=sql, check=True, capture_output=True)
        statement = owner.execute(
            "SELECT format('ALTER ROLE %I PASSWORD %L', $1, $2)", ROLE, PASSWORD
        )
        owner.execute(statement[0][0])
        hba = server / "pg_hba.conf"
        hba.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        owner.execute("SELECT pg_reload_conf()")
        door = TlsDoor(server, context)
        threading.Thread(target=door.open, daemon=True).start()
        with closing(door.listener):
            yield Guarded(door, owner, certificate)


# --- nights: runs behind the guarded door, good ones and failing ones, each kept with its traces

GPS = {1: "N", 2: (48.0, 51.0, 29.6), 3: "E", 4: (2.0, 17.0, 40.2), 29: "2025:12:24"}
MAKER = "ZQXJ-MAKER-0451"


@dataclass
class Nights:
    """What several runs in one folder left and printed."""

    workspace: Workspace
    guarded: Guarded
    runs: dict[str, Run] = field(default_factory=dict)
    processes: set[bytes] = field(default_factory=set)
    modes: dict[str, dict[Path, int]] = field(default_factory=dict)

    @property
    def elsewhere(self) -> list[Path]:
        """The folders that HOME and TMPDIR named."""
        return [self.workspace.folder.parent / name for name in ("home", "tmp")]

    def run(self, name: str, words: list[str], dsn: str, umask: str = "022", **env: str) -> None:
        """Run a command under this PG_DSN while every process on the machine is watched."""
        shell = ["sh", "-c", f'umask {umask}; exec "$@"', "sh", *words]
        before = time.time()
        with watched_processes(self.processes):
            self.runs[name] = self.workspace.execute(shell, {"PG_DSN": dsn, **env})
        work = self.workspace.folder
        self.modes[name] = {
            path.relative_to(work): stat.S_IMODE(path.stat().st_mode)
            for folder in ("results", "logs", "cache")
            for path in work.glob(f"{folder}/**/*")
            if path.stat().st_mtime > before
        }


@contextmanager
def watched_processes(seen: set[bytes]) -> Iterator[None]:
    """Collect the command lines of all processes of the machine while the block runs."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    seen.add(process.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def geotagged(workspace: Workspace, name: str, colour: str) -> str:
    """A photo whose EXIF says where it was taken and by what."""
    workspace.photo(name, colour)
    exif = Image.Exif()
    exif[0x010F] = exif[0x0110] = exif[0x9286] = MAKER  # Make, Model, UserComment
    exif.get_ifd(0x8825).update(GPS)
    path = workspace.photos / name
    with Image.open(path) as image:
        image.copy().save(path, exif=exif)
    assert MAKER.encode() in path.read_bytes()
    return name


@pytest.fixture(scope="module")
def nights(guarded: Guarded, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """A good run, a second one in the other form of DSN, and all kinds of failing ones."""
    place = tmp_path_factory.mktemp("nights")
    workspace = new_workspace(place / "work", guarded.owner, encoder)
    workspace.config["model_rev"] = "rev"
    workspace.env.pop("XDG_CACHE_HOME", None)
    for variable, name in (("HOME", "home"), ("TMPDIR", "tmp")):
        (place / name).mkdir()
        workspace.env[variable] = str(place / name)
    configure(workspace.folder, shards=1)
    owner = guarded.owner
    result = Nights(workspace, guarded)
    owner.add_listing(1, [geotagged(workspace, "1.jpg", "red")])
    words = [sys.executable, "-m", "pipeline", "run", "--cores", "2", "--model-rev", "rev",
             "--model-name", f"local-dir:{encoder}"]  # fmt: skip
    more = ["--", "--workflow-profile", str(REPOSITORY / "profiles/default")]
    result.run("url", [*words, *more], guarded.url(), umask="027")
    owner.add_listing(2, [geotagged(workspace, "2.jpg", "blue")])
    result.run("keywords", workspace.command(), guarded.keywords())
    result.run("report", [sys.executable, "-c", OFFLINE_REPORT, *workspace.command()[3:]],
               guarded.url())  # fmt: skip
    owner.add_listing(3, [geotagged(workspace, "3.jpg", "green")])
    other = random_encoder(place / "other", seed=2)
    result.run("mixed", workspace.command(config={"model_name": f"local-dir:{other}"}),
               guarded.url())  # fmt: skip
    owner.execute(
        'CREATE VIEW "iPhone".broken AS SELECT 1 AS generation, 1::bigint AS listing_id, now() AS'
        " edited_date, (1 / (random() * 0)::int)::text AS url, null::text AS spam"
    )
    owner.execute(f'GRANT SELECT ON "iPhone".broken TO {ROLE}')
    result.run("SQL error", workspace.command(), guarded.url(), LISTINGS_TABLE="broken")
    result.run("wrong password", workspace.command(), guarded.url(password=PASSWORD + "x"))
    with watched_processes(result.processes):
        for name, dsn in failing(guarded).items():
            result.runs[name] = workspace.python("-m", "pipeline", "check", env={"PG_DSN": dsn})
    return result


# The report's styles and scripts come from the network; nothing of them matters here.
OFFLINE_REPORT = """
import sys, types, requests
requests.get = lambda url: types.SimpleNamespace(status_code=200, text="")
from snakemake.cli import main
sys.argv += ["--report", "report.html"]
main()
"""


def configure(folder: Path, **settings: object) -> None:
    """Write a config.yaml with these settings, as one edits it by hand."""
    (folder / "config.yaml").write_text(
        "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items())
    )


def failing(guarded: Guarded) -> dict[str, str]:
    """DSNs that fail, each in its own way, by name."""
    good = guarded.url()
    return {
        "unescaped": f"postgresql://{ROLE}:{PASSWORD}@localhost:{guarded.door.port}/{MARKET}",
        "unescaped at": good.replace(quote(PASSWORD, safe=""), "@".join(PIECES)),
        "server down": good.replace(str(guarded.door.port), "1"),
        "no TLS": guarded.url(options="sslmode=disable"),
        "untrusted": guarded.url(options="sslmode=verify-full&sslrootcert=/dev/null"),
        "no such database": good.replace(f"/{MARKET}?", "/nothing?"),
        "no such option": good + "&nonsense=1",
        "bad keywords": f"host=localhost password={PASSWORD}",
        "bad URI": f"postgres//{PASSWORD}",
        "not UTF-8": f"postgresql://{ROLE}:{PIECES[0]}\udcff{PIECES[1]}@localhost/{MARKET}",
        "other software": f"mysql://{ROLE}:{quote(PASSWORD, safe='')}@localhost/{MARKET}",
    }


def texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    """All that the files of a folder say: names, bytes, and Parquet and base64 in the clear."""
    for path in folder.rglob("*"):
        yield str(path), os.fsencode(path)
        try:
            name = path.name + "=" * (-len(path.name) % 4)
            yield f"{path} (name)", base64.b64decode(name, altchars=b"-_", validate=True)
        except ValueError:
            pass
        if not path.is_file():
            continue
        yield str(path), path.read_bytes()
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                yield f"{path} (metadata)", str(file.schema_arrow.metadata).encode()
                columns = [n for n in file.schema_arrow.names if n != "vec"]
                yield f"{path} (rows)", str(file.read(columns).to_pylist()).encode()


def mentions(nights: Nights, words: list[str]) -> list[str]:
    """Where any of the words is found in what the runs left, printed or showed to `ps`."""
    said = [(name, run.output.encode()) for name, run in nights.runs.items()]
    said += [("process list", line) for line in nights.processes]
    work = nights.workspace.folder
    for folder in [work, *nights.elsewhere]:
        said += [t for t in texts(folder) if str(nights.workspace.photos) not in t[0]]
    return [where for where, text in said if any(word.encode() in text for word in words)]


@pytest.mark.timeout(240)
def test_the_job_runs_over_tls_as_the_least_privileged_role(nights: Nights) -> None:
    """With the rights of role.sql alone, whole runs load, with a URL and with keywords."""
    for name in ("url", "keywords"):
        assert nights.runs[name].code == 0, nights.runs[name].output

    assert [1, 2] == [row[0] for row in nights.guarded.owner.vectors()]
    assert nights.guarded.door.guests > 4
    assert "1 inserted, 0 updated, 0 unchanged" in nights.runs["keywords"].output


def test_failing_runs_say_so_in_one_line(nights: Nights) -> None:
    """Every failure of the connection or the load is one line, without a traceback."""
    for name in ["mixed", "SQL error", "wrong password", *failing(nights.guarded)]:
        run = nights.runs[name]

        assert run.code != 0, name
        assert "Traceback" not in run.output, run.output
        lines = [line for line in run.output.splitlines() if line.startswith("error")]
        assert 1 <= len(lines) <= 2, run.output
        assert "expected " in lines[0], lines


def test_the_password_is_in_no_file_output_or_process_list(nights: Nights) -> None:
    """Neither the password nor a piece of it is in anything that good and failing runs leave."""
    assert (nights.workspace.folder / "report.html").stat().st_size > 10_000
    known = ["listing_images_topk5_v1", "results/encode"]  # the search finds what is there
    places = " ".join(mentions(nights, known))
    for place in ("keywords", "process list", ".snakemake/metadata/", "(metadata)", "report.html"):
        assert place in places
    assert [] == mentions(nights, [PASSWORD, quote(PASSWORD, safe=""), *PIECES])


def test_the_equal_command_is_printed_without_the_dsn(nights: Nights) -> None:
    """`python -m pipeline run` shows the snakemake command, which holds nothing of PG_DSN."""
    command = nights.runs["url"].output.splitlines()[0]

    assert command.startswith("$ snakemake all --cores 2 ")
    assert f":{nights.guarded.door.port}" not in command


def test_exceptions_keep_no_piece_of_the_password(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of connect() holds no piece of PG_DSN, not even in the errors that it came from."""
    for name, dsn in (failing(guarded) | {"wrong": guarded.url("x" + PASSWORD)}).items():
        monkeypatch.setenv("PG_DSN", dsn)
        with pytest.raises(PipelineError) as failure, connections.connect():
            pass
        chain: list[BaseException] = [failure.value]
        while nested := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(nested)

        assert not [e for e in chain for piece in PIECES if piece in f"{e}{e.args!r}"], name


def test_exif_and_gps_reach_no_output(nights: Nights) -> None:
    """Nothing of a photo's EXIF is in results, logs, cache, or anything else but the photo."""
    assert [] == mentions(nights, [MAKER, MAKER.lower(), "48.0, 51.0", "2025:12:24", "GPS"])


def test_permissions_of_outputs_follow_the_umask(nights: Nights) -> None:
    """Under umask 027 nobody else may read what is written, under 022 everybody may."""
    private, public = nights.modes["url"], nights.modes["keywords"]
    again = {path: mode for path, mode in public.items() if path not in private}

    assert {0o750, 0o640} == set(private.values())
    assert {"results", "logs", "cache"} == {path.parts[0] for path in private}
    assert {0o644} == set(again.values())
    assert {"cache"} <= {path.parts[0] for path in again}
    assert {0o644} == {mode for path, mode in public.items() if path.suffix == ".parquet"}


def test_nothing_is_written_outside_the_work_folder(nights: Nights) -> None:
    """HOME and TMPDIR get no file; Snakemake makes the empty folders of its source cache."""
    found = {p for f in nights.elsewhere for p in f.rglob("*") if not p.is_dir()}

    assert set() == found
    assert {"cache", "config.yaml", "listing_images", "logs", "results", ".snakemake",
            "report.html"} == {p.name for p in nights.workspace.folder.iterdir()}  # fmt: skip


def test_the_encoder_is_named_in_every_file_that_holds_vectors(nights: Nights) -> None:
    """Encode and aggregate files, the cache and the registry tell one and the same encoder."""
    workspace = nights.workspace
    files = [
        *workspace.results.glob("encode/*.parquet"),
        *workspace.results.glob("aggregate/*.parquet"),
    ]
    last = [parquet.metadata(path)["encoder"] for path in files]
    cached = [parquet.metadata(path) for path in workspace.folder.glob("cache/vectors/*/*.parquet")]
    registered = nights.guarded.owner.execute(f"SELECT encoder::text FROM {REGISTRY}")

    assert set(ENCODER) == set(last[0])
    assert all(document == last[0] for document in last)
    assert [last[0]] == [json.loads(row[0]) for row in registered]
    assert all(document == last[0] for document in cached)


DENIED = [
    "DELETE FROM ml.img_vec512_v1",
    "TRUNCATE ml.img_vec512_v1",
    "DROP TABLE ml.img_vec512_v1",
    "ALTER TABLE ml.img_vec512_v1 ADD COLUMN x int",
    f"DELETE FROM {REGISTRY}",
    'UPDATE "iPhone".iphone_listings SET spam = null',
    'INSERT INTO "iPhone".iphone_listings VALUES (1, 1)',
    'DELETE FROM "iPhone".iphone_image_assets',
    "INSERT INTO ml.iphone_image_features_v1 VALUES (1, 1, 1, 1)",
    "CREATE TABLE ml.mine (x int)",
    "CREATE TABLE public.mine (x int)",
    "CREATE SCHEMA mine",
    "CREATE ROLE mine",
    "CREATE DATABASE mine",
    "SET ROLE postgres",
    "SELECT * FROM ml.other",
    "SELECT * FROM private.other",
    "SELECT rolpassword FROM pg_authid",
    "SELECT pg_read_file('PG_VERSION')",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY ml.img_vec512_v1 FROM '/etc/passwd'",
]


def test_the_role_can_do_nothing_else(guarded: Guarded) -> None:
    """Every statement beyond the job's own ends in 'insufficient privilege'."""
    guarded.owner.execute("CREATE TABLE ml.other (x int)")
    guarded.owner.execute("CREATE SCHEMA private CREATE TABLE other (x int)")
    allowed = []
    with adbc.connect(guarded.url(), autocommit=True) as role, role.cursor() as cursor:
        for statement in DENIED:
            try:
                cursor.execute(statement)
                allowed.append((statement, "no error"))
            except adbc_driver_manager.Error as error:
                if error.sqlstate != "42501":
                    allowed.append((statement, str(error)))

    assert [] == allowed


def test_the_role_may_ask_what_is_current(guarded: Guarded) -> None:
    """It has SELECT on the view, and the function needs no more than it has on the target."""
    with adbc.connect(guarded.url()) as role, role.cursor() as cursor:
        for relation in ("ml.img_vec512_v1_current", "ml.img_vec512_v1_as_of(now())"):
            cursor.execute(f"SELECT count(*) >= 0 FROM {relation}")

            assert [(True,)] == cursor.fetchall()


def test_the_export_reads_one_read_only_snapshot(workspace: Workspace) -> None:
    """The transaction that reads the inputs is READ ONLY and REPEATABLE READ, both times."""
    database = workspace.database
    database.add_listing(1)
    database.execute(
        """CREATE VIEW "iPhone".told AS SELECT 1 AS generation, 1::bigint AS listing_id,
        n AS image_index, current_setting(name) AS storage_path FROM (VALUES
        (0, 'transaction_read_only'), (1, 'transaction_isolation')) t (n, name)"""
    )
    target_of = [workspace.results / f"export/{name}.parquet" for name in ("listings", "images")]
    workspace.python(
        "-m", "pipeline.export", "--model-rev", "m", "--source", "s",
        "--listings", str(target_of[0]), "--images", str(target_of[1]),
        env={"ASSETS_TABLE": "told"},
    )  # fmt: skip

    assert ["on", "repeatable read"] == pq.read_table(target_of[1])["storage_path"].to_pylist()


# --- injections

PAYLOADS = [
    "'; DROP TABLE ml.img_vec512_v1; --",
    "$1 %s %(x)s :x ?",
    "$(touch pwned)`touch pwned`; touch pwned & touch pwned | touch pwned > pwned",
    "{input} {config} {params.code} {{x}} {0} %d",
    "'\"\\ \\\\ \\' \\n '' \"\" $HOME ~ * [a-z] !x #",
    "a: b, [c], &d, *e, !!python/object/apply:os.system ['touch pwned']",
    "--force",
]
NASTY = "; ".join(PAYLOADS)


@pytest.mark.timeout(240)
def test_text_settings_and_columns_are_data_and_never_run(workspace: Workspace) -> None:
    """SQL, shell, format and YAML in settings and columns arrive as they are; nothing is run."""
    database = workspace.database
    name = PAYLOADS[1] + PAYLOADS[2].replace("/", "") + PAYLOADS[3] + "'\""
    model = workspace.folder / f"encoder {name[-100:]}"
    shutil.copytree(workspace.encoder, model)
    root = workspace.folder / f"photos {name[:80]}"
    (root / "x").mkdir(parents=True)
    paths = [p for p in PAYLOADS if "/" not in p] + [f"x/{name[:60]}.jpg", "../../pwned; --"]
    for i, path in enumerate(paths[:-1]):
        photo = workspace.photo(f"{i}.jpg", "red", (40 + i, 40))
        shutil.move(workspace.photos / photo, root / path)
        database.add_listing(i, [path], url=NASTY)
    database.add_listing(98, [paths[-1]], url=NASTY)
    database.add_listing(99, ["0.jpg"], url=NASTY, spam=NASTY)
    cache = f"cache {name[:80]}"
    texts = {"source": NASTY, "pca_rev": NASTY, "cache_dir": cache,
             "model_name": f"local-dir:{model}", "pretrained": NASTY}  # fmt: skip
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in texts.items() if k != "cache_dir"]
    configure(workspace.folder, shards=1, cache_dir=cache)
    done = workspace.python(
        "-m", "pipeline", "run", *flags, "--cores", "2", env={"IMAGE_ROOT_DIR": str(root)}
    )
    shard = [
        row
        for path in sorted(workspace.results.glob("encode/*.parquet"))
        for row in pq.read_table(path, columns=["storage_path", "error"]).to_pylist()
    ]

    assert done.code == 0, done.output
    assert sorted(paths) == sorted(row["storage_path"] for row in shard)
    assert [paths[-1]] == [row["storage_path"] for row in shard if row["error"]]
    rows = database.vectors("listing_id, source, pca_rev")
    assert [(i, NASTY, NASTY) for i in range(len(paths) - 1)] == rows
    revs = {row[0].rpartition("/")[0] for row in database.vectors("model_rev")}
    assert {model.name} == revs
    assert (workspace.folder / cache / "vectors").is_dir()
    assert not [p for p in workspace.folder.parent.rglob("*") if p.name == "pwned"]


@pytest.mark.parametrize(
    "setting", ["source", "model_rev", "pca_rev", "model_name", "pretrained", "cache_dir"]
)
@pytest.mark.parametrize(
    "value", ["two\nlines", "bell\x07", "nul\x00", "esc\x1b[31m", "\u2028", ["a"], None]
)
def test_settings_that_are_no_line_of_text_are_refused(setting: str, value: Any) -> None:
    """Control characters and other types in a text setting are one line that names the setting."""
    with pytest.raises(SettingsError) as refusal:
        Settings.check({setting: value})

    assert setting in str(refusal.value)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "value", [*PAYLOADS, 'a"b', "a b", "1a", "é", "x" * 64, "a;b", "a.b", "a\n"]
)
def test_names_of_tables_and_roles_are_identifiers_or_refused(value: str) -> None:
    """A schema, table or role name that is no plain identifier never reaches a statement."""
    names = ["LISTINGS_SCHEMA", "LISTINGS_TABLE", "ASSETS_SCHEMA", "ASSETS_TABLE", "ML_SCHEMA",
             "IMAGE_FEATURES_TABLE", "VECTORS_TABLE"]  # fmt: skip
    for name in names:
        with pytest.raises(SettingsError, match=name):
            Environment.read({name: value})
    with pytest.raises(SettingsError, match="--role"):
        target.role_sql(Environment.read({}), value)


@pytest.mark.parametrize(
    "value",
    [*PAYLOADS, NASTY, "007", "1_000", "1e3", "nan", "true", "None", "null", "~", "", " x ", "a: b",
     "x:", "{a}", "[a]", "2024-01-01", "é", "a#b", "a #b", "-", "hf-hub:owner/name"],
)  # fmt: skip
def test_the_printed_command_carries_a_text_exactly(value: str) -> None:
    """Snakemake reads from `--config` of the equal command the very text that the flag gave."""
    from snakemake.cli import parse_config

    parser = argparse.ArgumentParser()
    run.add_flags(parser)
    words = run.snakemake_command(parser.parse_args([f"--pca-rev={value}", f"--model-rev={value}"]))
    config = words[words.index("--config") + 1 :]

    assert {"pca_rev": value, "model_rev": value} == dict(parse_config(config))
