"""What the Snakefile asks while it is read: settings, flags, targets. Imports no snakemake.

A failure ends Snakemake with one line. A rule's params are its flags and a digest of its code, so
`snakemake -n` shows which setting changed; speed settings are resources, which cause no rerun.
"""

import fcntl
import functools
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pipeline import database, failures, lifetime, parquet, source, target
from pipeline.errors import DatabaseUnreachable, PipelineError, SettingsError, storage_errors
from pipeline.model import Model, find_model
from pipeline.settings import Environment, Settings

P = ParamSpec("P")
T = TypeVar("T")

LISTINGS = Path("results/export/listings.parquet")
FAILURES = Path("results/aggregate/failures.json")
RECEIPT = Path("results/load/receipt.json")

SAMPLE_ROWS = 1000  # listings by which an export is known to be of this database

# What of an image may be read; a listing that was refused by them is tried again when they change.
LIMITS = ("follow_symlinks", "max_image_bytes", "max_image_pixels")

# The modules whose code decides what a stage writes. An edit reruns the stage and what follows.
CODE = {
    "export": ("export", "source"),
    "select": ("select",),
    "encode": ("encode", "encoder", "image", "photo_files"),
    "aggregate": ("aggregate",),
    "load": ("load", "target"),
    "benchmark": ("benchmark",),
}


def one_line_errors(function: Callable[P, T]) -> Callable[P, T]:
    """End Snakemake with the error's one line instead of a traceback."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with storage_errors():
                return function(*args, **kwargs)
        except PipelineError as error:
            raise SystemExit(f"error: {error}") from None

    return wrapped


class Workflow:
    """The flags and targets of one run of Snakemake."""

    @one_line_errors
    def __init__(self, config: Mapping[str, Any]) -> None:
        self.settings = Settings.check(config)
        self.environment = Environment.read()

    @functools.cached_property
    def model(self) -> Model:
        """The encoder that the settings name, without its weights in memory."""
        chosen = self.settings
        return find_model(chosen.model_name, chosen.pretrained, remember=Path(chosen.cache_dir))

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """The part of the target's key that the settings decide."""
        chosen = self.settings
        return {
            "source": chosen.source,
            "model_rev": chosen.model_rev or self.model.model_rev,
            "pca_rev": chosen.pca_rev,
        }

    @functools.cached_property
    def _recorded(self) -> dict[str, Any] | None:
        """The params of the export at hand."""
        return dict(parquet.metadata(LISTINGS)["export"]) if LISTINGS.exists() else None

    @functools.cached_property
    def _export(self) -> dict[str, Any] | None:
        """The params of the export that is needed now; None if none is.

        With nothing pending, the export at hand remains the current one, since what follows from
        it depends on other settings; unless it is of another database or another key.
        """
        state = self._source_state(self._recorded)
        if state is None:
            return self._recorded if self._is_current(self._recorded) else None
        wanted = {
            "limit_listings": self.settings.limit_listings,
            "force": self.settings.force,
            **self.identity,
            "state": state,
        }
        return self._recorded if _same(self._recorded, wanted) else wanted

    def _source_state(self, recorded: dict[str, Any] | None) -> dict[str, str] | None:
        """A digest of the pending rows, read-only and cheap; None when nothing is pending."""
        chosen = self.settings.model_copy(update=self.identity)
        waiting = failures.waiting(chosen, self.environment.image_root, self.identity)
        with (
            database.connect(read_only=True, repeatable=True) as connection,
            connection.cursor() as cursor,
        ):
            source.check_inputs(cursor, self.environment)
            target.check(cursor, self.environment, self.model.embed_dim)
            pending = source.prepare(cursor, self.environment, chosen, waiting)
            listings, images, *sums = database.fetch(cursor, pending.digest)[0]
        if not listings:
            return None
        return {
            "pending": f"{listings} listings, {images} images, {_digest(sums)}",
            "after_load": _last_load(recorded),
            "changed_files": failures.changed_files(FAILURES, chosen, self.environment.image_root),
        }

    def _is_current(self, recorded: dict[str, Any] | None) -> bool:
        """Whether the export at hand is for this key, and its newest listings of this database."""
        if recorded is None or any(recorded[k] != v for k, v in self.identity.items()):
            return False
        newest = next(parquet.batches(LISTINGS, SAMPLE_ROWS, ["listing_id", "edited_date"]), None)
        if newest is None:
            return False
        with database.connect(read_only=True) as connection, connection.cursor() as cursor:
            rows = zip(*(column.to_pylist() for column in newest.columns), strict=True)
            return source.has_any(cursor, self.environment, list(rows))

    @one_line_errors
    def table(self, wildcards: object) -> list[str]:
        """Target all: the receipt of the load, or nothing where there is nothing to load."""
        if os.environ.get("PG_DSN") == database.NO_DATABASE:
            raise SettingsError(
                "PG_DSN of a database to load into", "none", "", "the target without is: vectors"
            )
        if self._export is None:
            print("Nothing is pending: the table has a vector of every eligible listing.")
            return []
        return [str(RECEIPT)]

    @one_line_errors
    def export(self, wildcards: object) -> str:
        """Flags of export: they change when what is pending changes, and only then."""
        nothing = {
            "limit_listings": self.settings.limit_listings,
            "force": self.settings.force,
            **self.identity,
            "state": {"pending": "nothing", "after_load": "", "changed_files": ""},
        }
        try:
            params = self._export or nothing
        except DatabaseUnreachable as error:
            if self._recorded is None:
                raise
            print(f"{error}; going on with {LISTINGS.parent} as it is", file=sys.stderr)
            params = self._recorded
        state = json.dumps(params["state"], sort_keys=True)
        return (
            flags({**{k: params[k] for k in nothing}, "state": state}) + f" {self._flags(*LIMITS)}"
        )

    def select(self, wildcards: object) -> str:
        """Flags of select."""
        return self._flags("topk", "exclude_stock", "exclude_screenshots")

    @one_line_errors
    def encode(self, wildcards: object) -> str:
        """Flags of encode: the encoder and what of an image it may read."""
        named = self._flags(
            "model_name", "pretrained", "precision", "decode", "apply_exif_orientation", *LIMITS
        )
        return f"{named} {flags({'weights': self.model.weights})}"

    @one_line_errors
    def aggregate(self, wildcards: object) -> str:
        """Flags of aggregate: the key that the vectors get."""
        return flags(self.identity)

    def load(self, wildcards: object) -> str:
        """Flags of load."""
        return self._flags("max_failed_fraction", *LIMITS)

    def benchmark(self, wildcards: object) -> str:
        """Flags of benchmark."""
        return f"{self.encode(wildcards)} {self._flags('benchmark_images')}"

    def _flags(self, *names: str) -> str:
        return flags({name: getattr(self.settings, name) for name in names})


def flags(values: Mapping[str, object]) -> str:
    """Settings as quoted command-line flags; an empty text stays an argument of its own."""
    words = (f"--{name.replace('_', '-')}={value}" for name, value in values.items())
    return shlex.join(words)


def code(stage: str) -> str:
    """A digest of the code that decides what a stage writes; mtimes play no part."""
    digest = hashlib.sha256()
    for module in CODE[stage]:
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    return digest.hexdigest()[:12]


def _same(recorded: dict[str, Any] | None, wanted: dict[str, Any]) -> bool:
    """Whether the export at hand holds what is pending now.

    A limit that cuts nothing off makes no difference, nor does a retry that has been made.
    """
    if recorded is None:
        return False

    def essence(params: dict[str, Any]) -> dict[str, Any]:
        state = dict(params["state"])
        if not wanted["state"]["changed_files"]:
            state.pop("changed_files", None)
        return {**params, "limit_listings": None, "state": state}

    return essence(recorded) == essence(wanted)


def _last_load(recorded: dict[str, Any] | None) -> str:
    """Which load came last. Rows that are pending again after it were deleted or edited.

    While a load runs there is no receipt: then the export at hand still is the current one.
    """
    if RECEIPT.exists():
        return str(json.loads(RECEIPT.read_text())["load_id"])
    return str(recorded["state"].get("after_load", "")) if recorded else ""


def _digest(values: list[object]) -> str:
    return hashlib.sha256(json.dumps([str(v) for v in values]).encode()).hexdigest()[:16]


def run_this_checkout() -> None:
    """Let `python -m pipeline.<stage>` be this code, in the Python that runs Snakemake."""
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    lifetime.mark_run()


def lock_folder() -> None:
    """Only one run at a time in a folder. The kernel drops the lock with its holder.

    Snakemake's own lock survives a SIGKILL and has to be removed by hand; profiles/default
    switches it off.
    """
    Path(".snakemake").mkdir(exist_ok=True)
    file = os.open(".snakemake/run.lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(
            f"error: another run is at work in {Path.cwd().name}/; hint: wait for its end, or use"
            " another --directory"
        ) from None
