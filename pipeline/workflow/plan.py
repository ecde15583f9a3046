"""What the Snakefile asks while it is read: settings, flags, targets. Imports no snakemake.

A failure ends Snakemake with one line. A rule's params are its flags and a digest of its code, so
`snakemake -n` shows which setting changed; speed settings are resources, which cause no rerun.
"""

import functools
import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from adbc_driver_manager.dbapi import Cursor

from pipeline.database import registry, rights, target, waiting
from pipeline.database.connection import (
    NO_DATABASE,
    connect,
    data_source_name,
    described,
    fetch,
)
from pipeline.database.inputs import check_inputs
from pipeline.database.pending import Digest, Pending, has_any, prepare
from pipeline.database.registry import MadeBy
from pipeline.encoder.model import Model, identity_of, model_of
from pipeline.stage import lifetime, parquet
from pipeline.stage.errors import DatabaseUnreachable, PipelineError, SettingsError, storage_errors
from pipeline.stage.settings import (
    CONFIG,
    MOST_SHARDS,
    Environment,
    Identity,
    Settings,
    config_values,
    find_config,
)
from pipeline.workflow import words
from pipeline.workflow.code import PIPELINE
from pipeline.workflow.hooks import refusals
from pipeline.workflow.preflight import check_cache_dir
from pipeline.workflow.summary import last_rate

P = ParamSpec("P")
T = TypeVar("T")
Params = Callable[[object], str]  # of a rule's wildcards: Snakemake asks as it builds its graph

LISTINGS = Path("results/export/listings.parquet")
IMAGES = Path("results/export/images.parquet")
SELECTED = Path("results/select")
VECTORS = Path("results/aggregate/listing_vectors.parquet")
WITHOUT_VECTOR = Path("results/aggregate/without_vector.parquet")
RECEIPT = Path("results/load/receipt.json")

NOTHING = {"pending": "nothing", "after_load": "", "changed_files": ""}
SCATTER = "encode"  # the Snakefile's name of the split
PHOTOS_A_SHARD = 10_000  # some minutes of work on a processor, and a small part of it to load
SAMPLE_ROWS = 1000  # listings by which an export is known to be of this database


def one_line_errors(function: Callable[P, T]) -> Callable[P, T]:
    """End Snakemake with the error's one line instead of a traceback."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with storage_errors():
                return function(*args, **kwargs)
        except PipelineError as error:
            refusals.append(f"error: {error}")
            raise SystemExit(refusals[-1]) from None

    return wrapped


@one_line_errors
def config_file() -> str | None:
    """The settings' file, if there is one, read first: Snakemake words its faults less well."""
    path = find_config()
    if path is None:
        return None
    config_values(path)
    return str(path)


class Workflow:
    """The flags and targets of one run of Snakemake."""

    @one_line_errors
    def __init__(
        self,
        config: Mapping[str, Any],
        files: Sequence[str | Path] = (),
        given: Collection[str] = (),
    ) -> None:
        """`config` as Snakemake merged it, from `files` and, for the keys in `given`, --config."""
        where = ", ".join(map(str, files)) or str(CONFIG)
        self.settings = Settings.check(config, where, given)
        self.environment = Environment.read()
        check_cache_dir(self.settings)
        data_source_name()
        self.database = "no database"
        self._speaks = False

    @functools.cached_property
    def model(self) -> Model:
        """The encoder that the settings name, without its weights in memory."""
        return model_of(self.settings)

    @functools.cached_property
    def identity(self) -> Identity:
        """The part of the target's key that the settings decide."""
        return identity_of(self.settings, self.model)

    @functools.cached_property
    def _recorded(self) -> dict[str, Any] | None:
        """The params of the export at hand."""
        return dict(parquet.metadata(LISTINGS)["export"]) if LISTINGS.exists() else None

    @property
    def _export(self) -> dict[str, Any] | None:
        """The params of the export that is needed now; None if none is."""
        if isinstance(self._asked, PipelineError):
            raise self._asked
        return self._asked.export

    @functools.cached_property
    def _asked(self) -> "Plan | PipelineError":
        """What the database says is to be done; asked once, also where that fails."""
        try:
            with storage_errors():
                return self._ask()
        except PipelineError as error:
            return error

    def _ask(self) -> "Plan":
        """What is to be exported.

        With nothing pending, the export at hand remains the current one, since what follows from
        it depends on other settings; unless it is of another database or another key.
        """
        state, photos, line = self._pending_state(self._recorded)
        if state is None:
            return Plan(self._recorded if self._is_current(self._recorded) else None, photos, line)
        wanted = self._wanted(state)
        return Plan(self._recorded if _same(self._recorded, wanted) else wanted, photos, line)

    def _wanted(self, state: dict[str, str]) -> dict[str, Any]:
        """The params of an export by these settings."""
        return {
            "limit_listings": self.settings.limit_listings,
            "force": self.settings.force,
            **self.identity._asdict(),
            "state": state,
        }

    def _pending_state(
        self, recorded: dict[str, Any] | None
    ) -> tuple[dict[str, str] | None, int, str]:
        """A digest of the pending rows, how many photos they select, and a line for people.

        None and 0 when nothing is pending. Read-only and cheap.
        """
        files = waiting.Files(self._chosen, self.environment.image_root)
        left_out = waiting.left_out(files, self._chosen, self.identity)
        with (
            connect(read_only=True, repeatable=True) as connection,
            connection.cursor() as cursor,
        ):
            self.database = described(cursor)
            check_inputs(cursor, self.environment)
            rights.check_reading(cursor, self.environment)
            target.check(cursor, self.environment, self.model.dimension)
            pending = prepare(cursor, self.environment, self._chosen, left_out)
            self._refuse_mixing(cursor, pending.rest)
            digest = Digest(*fetch(cursor, pending.digest)[0])
            line = self._line(cursor, pending, digest) if self._speaks else ""
        if not digest.listings:
            return None, digest.photos, line
        sums = _digest([digest.listings_sum, digest.images_sum])
        state = {
            "pending": f"{digest.listings} listings, {digest.images} images, {sums}",
            "after_load": _last_load(recorded),
            "changed_files": waiting.changed_files(files, WITHOUT_VECTOR),
        }
        return state, digest.photos, line

    def _line(self, cursor: Cursor, pending: Pending, digest: Digest) -> str:
        """What the run has to do, or why there is nothing to be done."""
        if not digest.listings:
            return f"Nothing is pending: {words.where(cursor, pending)}"
        from pipeline.workflow.outlook import foresee  # polars and the cache: only where needed

        outlook = foresee(
            cursor, pending, digest, self._chosen, self.environment, self.model, last_rate()
        )
        return words.plan(digest, outlook, self.settings.force)

    @functools.cached_property
    def _chosen(self) -> Settings:
        """The settings with the whole key."""
        return self.settings.model_copy(update=self.identity._asdict())

    def standing(self) -> str:
        """Where the listings stand in the database now."""
        chosen = self._chosen.model_copy(update={"force": False})
        files = waiting.Files(chosen, self.environment.image_root)
        left_out = waiting.left_out(files, chosen, self.identity)
        with (
            connect(read_only=True, repeatable=True) as connection,
            connection.cursor() as cursor,
        ):
            pending = prepare(cursor, self.environment, chosen, left_out)
            return words.where(cursor, pending)

    def _say_plan(self) -> None:
        """Print the plan, once, on standard error: what is asked for may be a picture."""
        if self._speaks and isinstance(self._asked, Plan):
            print(self._asked.line, file=sys.stderr)
        self._speaks = False

    def _refuse_mixing(self, cursor: Cursor, rest: str) -> None:
        """MixedVectors for what the load would refuse, before a night of encoding."""
        there = registry.displaced(cursor, self.environment, self.settings, self.model)
        if there is not None:
            made_by = MadeBy.planned(self.settings, self.model)
            rows = fetch(cursor, rest)[0][0]
            registry.refuse_a_rest(rows, there, made_by, self.environment, self.identity)

    def _is_current(self, recorded: dict[str, Any] | None) -> bool:
        """Whether the export at hand is for this key, and its newest listings of this database."""
        if recorded is None or any(recorded[k] != v for k, v in self.identity._asdict().items()):
            return False
        newest = next(parquet.batches(LISTINGS, SAMPLE_ROWS, ["listing_id", "edited_date"]), None)
        if newest is None:
            return False
        with connect(read_only=True) as connection, connection.cursor() as cursor:
            rows = zip(*(column.to_pylist() for column in newest.columns), strict=True)
            return has_any(cursor, self.environment, list(rows))

    @one_line_errors
    def shards(self, workflow: Any) -> int:
        """How many shards: as --set-scatter or `shards` say, as they are, or as the photos need.

        A split alone reruns nothing: with nothing left to do, the one at hand remains. Processes
        that Snakemake starts for a job get the main one's number, by --set-scatter, and do not ask.
        """
        scatter = workflow.resource_settings.overwrite_scatter
        given: int | None = scatter.get(SCATTER)
        self._speaks = workflow.is_main_process
        if given is not None and not workflow.is_main_process:
            return given
        number = self._shards(given)
        workflow.resource_settings.overwrite_scatter = {**scatter, SCATTER: number}
        return number

    def _shards(self, given: int | None) -> int:
        wanted = given or (None if self.settings.shards == "auto" else self.settings.shards)
        at_hand = _split_of(self._recorded)
        if wanted and at_hand in (None, wanted):
            return wanted
        plan = self._asked
        if isinstance(plan, PipelineError):  # said later, if there is no going on without
            keep = not given or _aggregated() == self._recorded
            photos = self._photos_at_hand()
        elif plan.photos:
            keep = not wanted and plan.export is self._recorded
            photos = plan.photos
        else:
            keep = plan.export is not None
            photos = self._photos_at_hand() if keep else 0
        return (at_hand if keep else None) or wanted or _enough(photos)

    def _photos_at_hand(self) -> int:
        """How many photos the export at hand may select; 0 without one."""
        if not (LISTINGS.exists() and IMAGES.exists()):
            return 0
        return min(parquet.rows([IMAGES]), parquet.rows([LISTINGS]) * self.settings.topk)

    def table(self, files: Sequence[str]) -> Callable[[object], list[str]]:
        """Target all: these files and the receipt, or nothing where there is nothing to load."""

        @one_line_errors
        def of_table(wildcards: object) -> list[str]:
            if os.environ.get("PG_DSN") == NO_DATABASE:
                raise SettingsError(
                    "PG_DSN of a database to load into", "none", "",
                    "the target without is: vectors",
                )  # fmt: skip
            export = self._export
            self._say_plan()
            if export is None:
                return []
            with connect(read_only=True) as connection, connection.cursor() as cursor:
                rights.check_writing(cursor, self.environment)
            return [*files, str(RECEIPT)]

        return of_table

    @staticmethod
    def moment(wildcards: object) -> str:
        """The param of what is made anew each time that it is asked for."""
        return datetime.now(UTC).isoformat()

    def flags(self, *names: str) -> Params:
        """The params of a rule: these settings, as flags of its command.

        `weights`, the hash of the model's, and `projection`, that of the file of `pca`, go under
        their names too. The key is complete: an empty model_rev stands for the model's, an empty
        pca_rev for the projection's.
        """

        @one_line_errors
        def of_settings(wildcards: object) -> str:
            return flags({name: self._value(name) for name in names})

        return of_settings

    def _value(self, name: str) -> object:
        if name == "weights":
            return self.model.weights
        if name == "projection":
            return self.model.projection.digest if self.model.projection else ""
        return getattr(self.identity if name in Identity._fields else self.settings, name)

    def export(self, *names: str) -> Params:
        """The params of export: these settings and the state of the pending rows, as flags.

        They are those of the export at hand while it is the current one.
        """

        @one_line_errors
        def of_export(wildcards: object) -> str:
            exported = self._exported()
            self._say_plan()
            values = {n: exported[n] if n in exported else self._value(n) for n in names}
            return flags({**values, "state": json.dumps(exported["state"], sort_keys=True)})

        return of_export

    def _exported(self) -> dict[str, Any]:
        """The params of the export that is needed now; of the one at hand if no database is."""
        try:
            return self._export or self._wanted(NOTHING)
        except DatabaseUnreachable as error:
            if self._recorded is None:
                raise
            print(f"{error}; going on with {LISTINGS.parent} as it is", file=sys.stderr)
            return self._recorded


class Plan(NamedTuple):
    """What the database asks for: the params of an export, and how many photos it may select.

    No photos: nothing is pending, and the export is the one at hand, if it is of this database.
    """

    export: dict[str, Any] | None
    photos: int
    line: str  # the same for people


def _enough(photos: int) -> int:
    """As many shards as so many photos need: one at least, since each loads the model."""
    return max(1, min(MOST_SHARDS, math.ceil(photos / PHOTOS_A_SHARD)))


def _split_of(export: dict[str, Any] | None) -> int | None:
    """The number of the shards at hand, if they are all there and of this export."""
    names = {path.name for path in SELECTED.glob("*-of-*.parquet")}
    if not names or names != {f"{n}-of-{len(names)}.parquet" for n in range(1, len(names) + 1)}:
        return None
    made_by = parquet.metadata(SELECTED / f"1-of-{len(names)}.parquet")
    return len(names) if made_by["export"] == export else None


def _aggregated() -> dict[str, Any] | None:
    """The params of the export whose vectors are aggregated."""
    return dict(parquet.metadata(VECTORS)["export"]) if VECTORS.exists() else None


def flags(values: Mapping[str, object]) -> str:
    """Settings as quoted command-line flags; an empty text stays an argument of its own."""
    words = (f"--{name.replace('_', '-')}={value}" for name, value in values.items())
    return shlex.join(words)


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
    """Let `python -m pipeline.<stage>` be this code, in the Python that runs Snakemake.

    And `sbatch` the one that hands no job the secret. What a cluster's modules have put on either
    path stays behind them.
    """
    _search_first("PATH", Path(sys.executable).parent)
    _search_first("PATH", PIPELINE.parent / "profiles" / "slurm" / "bin")
    _search_first("PYTHONPATH", PIPELINE.parent)
    lifetime.mark_run()


def _search_first(variable: str, folder: Path) -> None:
    others = [
        word
        for word in os.environ.get(variable, "").split(os.pathsep)
        if word not in ("", str(folder))
    ]
    os.environ[variable] = os.pathsep.join([str(folder), *others])
