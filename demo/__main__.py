"""Try the whole job on this machine: an embedded Postgres, a marketplace, the workflow, a search.

What it makes lives in ./demo/data, and the results where any run leaves them. Run it twice: the
second run finds nothing to do.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from demo import encoder, marketplace, postgres, report
from pipeline.stage import command
from pipeline.stage.errors import PipelineError, SettingsError

ROOT = Path(__file__).resolve().parents[1]  # where the Snakefile is
FOLDER = "demo/data"
ENCODER = "efficientnet-lite0"

# Of the user's environment these must not reach the demo: his database, his tables, his cluster.
OURS = frozenset(
    {
        "IMAGE_ROOT_DIR", "IMAGE_FEATURE_VERSION", "LISTINGS_SCHEMA", "LISTINGS_TABLE",
        "ASSETS_SCHEMA", "ASSETS_TABLE", "ML_SCHEMA", "IMAGE_FEATURES_TABLE", "VECTORS_TABLE",
        "SNAKEMAKE_PROFILE",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where the photos come from; each has a database of its own."""

    name: str
    market: marketplace.Marketplace
    made_up: bool


def main() -> None:
    flags = _flags()
    folder = Path(flags.folder).resolve()
    _forget_users_database()
    if flags.action == "stop":
        stopped = postgres.stop(folder / "postgres")
        print(
            "The demo's Postgres is stopped." if stopped else "The demo's Postgres is not running."
        )
        return
    origin = _origin(flags.photos, flags.listings, folder)
    dsn = _set_up(origin, folder)
    model = f"local-dir:{shown(folder / ENCODER)}"
    words = ["snakemake", "--cores", str(flags.cores), "--config", f"model_name={model}"]
    with _in_store(origin.market) if flags.s3 else nullcontext():
        _run(words, f"PG_DSN=... IMAGE_ROOT_DIR={shlex.quote(os.environ['IMAGE_ROOT_DIR'])}")
        _make_page(words)
    report.print_report(
        dsn, folder, shown(origin.market.root), shlex.join(words), made_up=origin.made_up
    )


def _flags() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.prog = "python -m demo"
    parser.add_argument(
        "action", nargs="?", default="run", choices=["run", "stop"], help="stop: the Postgres"
    )
    parser.add_argument("--photos", default="", help="your own photos: each subfolder is a listing")
    parser.add_argument("--s3", action="store_true", help="read the photos from an object store")
    parser.add_argument("--folder", default=FOLDER, help="where the demo keeps what it makes")
    parser.add_argument("--listings", type=int, default=240, help="how many to make up")
    parser.add_argument("--cores", default=os.cpu_count(), help="CPU cores to use")
    flags = parser.parse_args()
    if flags.listings < 1:
        raise SettingsError("at least one listing", str(flags.listings), "--listings")
    return flags


def _forget_users_database() -> None:
    """Neither this process nor those it starts can reach anything but the demo's own server."""
    for name in [n for n in os.environ if n.startswith(("PG", "AWS_")) or n in OURS]:
        del os.environ[name]


def _origin(photos: str, listings: int, folder: Path) -> Origin:
    if not photos:
        name = f"made_up_{listings}"
        market = marketplace.made_up(folder / "photos" / name, listings)
        return Origin(name, market, made_up=True)
    market = marketplace.from_photos(Path(photos).expanduser())
    digest = hashlib.sha256(os.fsencode(market.root)).hexdigest()[:8]
    return Origin(f"photos_{digest}", market, made_up=False)


def _set_up(origin: Origin, folder: Path) -> str:
    """Server, tables, photos, rows, encoder; what is there already is kept. Gives the PG_DSN."""
    _say(f"Postgres in {shown(folder / 'postgres')}")
    postgres.start(folder / "postgres")
    dsn = postgres.create_database(folder / "postgres", origin.name)
    os.environ["PG_DSN"] = dsn
    os.environ["IMAGE_ROOT_DIR"] = shown(origin.market.root)
    _say(f"Encoder in {shown(folder / ENCODER)}: EfficientNet-Lite0, trained on ImageNet")
    encoder.efficientnet_encoder(folder / ENCODER)
    create = ["-m", "pipeline", "create-table", "--all", "--dimension", str(encoder.DIM)]
    _check(["python", *create], subprocess.run([sys.executable, *create], cwd=ROOT))
    if origin.made_up:
        _draw_photos(origin.market)
    # The rows of a made-up marketplace are the user's to play with, so they are written once.
    if not origin.made_up or marketplace.is_empty(dsn):
        marketplace.fill(dsn, origin.market)
    _say(f"Marketplace: {len(origin.market.listings)} listings, {len(origin.market.images)} images")
    return dsn


def _draw_photos(market: marketplace.Marketplace) -> None:
    start = time.monotonic()
    _say(f"Photos in {shown(market.root)}")
    drawn = marketplace.draw_photos(market, os.cpu_count() or 1)
    if drawn:
        _say(f"{drawn} photos drawn in {time.monotonic() - start:.0f} s")


@contextmanager
def _in_store(market: marketplace.Marketplace) -> Iterator[None]:
    """The photos in an object store of this process's, which the environment leads to."""
    from demo import store  # of packages that only tests and this need

    with store.serving() as server:
        _say(f"Object store at {server.address}, gone at the end")
        os.environ |= server.variables
        os.environ["IMAGE_ROOT_DIR"] = server.upload(
            market.root, sorted({image["storage_path"] for image in market.images})
        )
        yield


def _run(words: list[str], environment: str) -> None:
    """The command a user types, as the user would see it; the DSN is in its environment."""
    print(f"\n$ {environment} {shlex.join(words)}\n", flush=True)
    _check(words, subprocess.run([sys.executable, "-m", *words], cwd=ROOT))


def _make_page(words: list[str]) -> None:
    """The target `report` of the same command; what it says is of interest where it fails."""
    target = [*words[:3], "report", *words[3:]]
    done = subprocess.run(
        [sys.executable, "-m", *target], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.stderr.buffer.write(done.stdout)
    _check(target, done)


def _check(words: list[str], done: subprocess.CompletedProcess[bytes]) -> None:
    if done.returncode != 0:
        raise PipelineError(
            f"{shlex.join(words[:4])} to succeed",
            f"exit code {done.returncode}",
            hint="what went wrong is above; python -m demo stop ends the Postgres",
        )


def shown(path: Path) -> str:
    """A path as one would type it in the repository."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    command.run(main, "demo")
