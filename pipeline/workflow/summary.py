"""What a run did: told at its end from the files that it wrote, and kept for later.

Which stages ran is told by their logs, which each of them begins anew.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.photos.ahead import limit
from pipeline.stage import parquet
from pipeline.stage.command import clock
from pipeline.stage.errors import PipelineError
from pipeline.stage.settings import Identity

RESULTS = Path("results")
LOGS = Path("logs")
RECORD = Path(".snakemake/last-run.json")  # of this folder: results travel between machines
CHAIN = ("export", "select", "encode", "aggregate", "load")
NOTHING = "nothing to do"


@dataclass(frozen=True)
class Run:
    """One run of Snakemake, as it is kept. Times are in seconds since 1970."""

    began: float
    ended: float
    database: str
    table: str
    key: Identity
    stages: dict[str, str] = field(default_factory=dict)
    outcome: str = ""  # one line: where the listings stand after it, or the error
    images_per_second: float | None = None  # of encoding, as measured last

    def lines(self) -> Iterator[str]:
        """For a person."""
        when = datetime.fromtimestamp(self.began, UTC)
        yield f"run of {when:%Y-%m-%d %H:%M:%S} UTC, {clock(self.ended - self.began)}"
        rows = {
            "database": f"{self.database}, {self.table}",
            "key": str(self.key),
            **self.stages,
            "result": self.outcome,
        }
        yield from (f"  {name:<10} {text}" for name, text in rows.items() if text)


def main() -> None:
    """Print the last run's lines again."""
    run = read()
    if run is None:
        print("no run has ended in this folder yet")
        return
    print("\n".join(run.lines()))


def read() -> Run | None:
    """The run that ended last in this folder; None where none has."""
    try:
        kept = json.loads(RECORD.read_text())
        return Run(**{**kept, "key": Identity(*kept["key"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep(run: Run) -> None:
    """Remember the run as the last one; a disk that takes no file does not hide how it ended."""
    with suppress(OSError, PipelineError):
        RECORD.parent.mkdir(exist_ok=True)
        parquet.write_json(RECORD, asdict(run))


def last_rate() -> float | None:
    """Images encoded a second, as this folder's runs measured it last, or else its benchmark."""
    run = read()
    if run and run.images_per_second:
        return run.images_per_second
    report = RESULTS / "benchmark" / "benchmark.json"
    return float(json.loads(report.read_text())["images_per_second"]) if report.exists() else None


def measured_rate(since_ns: int) -> float | None:
    """Images encoded a second in the run that began then; None where it encoded too few."""
    stats = [s for s in _encode_stats(since_ns) if s["images_per_second"]]
    if not stats:
        return None
    alone = sum(s["encoded"] / s["images_per_second"] for s in stats)
    seconds = sum(s["seconds"] for s in stats)
    span = max(s["ended"] for s in stats) - min(s["ended"] - s["seconds"] for s in stats)
    side_by_side = max(1.0, seconds / max(span, 1e-3))
    return float(sum(s["encoded"] for s in stats) / alone * side_by_side)


def stages(since_ns: int) -> dict[str, str]:
    """What each stage did in the run that began then, in data order, as far as the run went."""
    ran = [stage for stage in CHAIN if _ran(stage, since_ns)]
    last = CHAIN.index(ran[-1]) + 1 if ran else 0
    said = {stage: _TOLD[stage](since_ns) if stage in ran else NOTHING for stage in CHAIN[:last]}
    if _ran("benchmark", since_ns):
        said["benchmark"] = _benchmark(since_ns)
    if _ran("evaluate", since_ns):
        said["evaluate"] = _evaluate(since_ns)
    if _ran("report", since_ns):
        said["report"] = _report(since_ns)
    return {stage: text or "not finished" for stage, text in said.items()}


def _ran(stage: str, since_ns: int) -> bool:
    logs = [LOGS / f"{stage}.log", *(LOGS / stage).glob("*.log")]
    return bool(_since(logs, since_ns))


def _since(paths: Iterable[Path], since_ns: int) -> list[Path]:
    """Those that were written since."""
    return [path for path in paths if path.exists() and path.stat().st_mtime_ns >= since_ns]


def _export(since_ns: int) -> str:
    names = ("listings", "images")
    files = _since([RESULTS / "export" / f"{name}.parquet" for name in names], since_ns)
    if len(files) < len(names):
        return ""
    listings, images = (parquet.rows([file]) for file in files)
    return f"{listings} listings, {images} images -> {RESULTS / 'export'}"


def _select(since_ns: int) -> str:
    shards = _since((RESULTS / "select").glob("*.parquet"), since_ns)
    where = f"{len(shards)} shard{'' if len(shards) == 1 else 's'} -> {RESULTS / 'select'}"
    return f"{parquet.rows(shards)} images in {where}" if shards else ""


def _encode(since_ns: int) -> str:
    done = _encode_stats(since_ns)
    if not done:
        return ""
    shards = len(list((RESULTS / "select").glob("*.parquet")))
    part = f" in {len(done)} of {shards} shards" if len(done) < shards else ""
    return f"{encoded(done)}{part} -> {RESULTS / 'encode'}"


def _aggregate(since_ns: int) -> str:
    folder = RESULTS / "aggregate"
    failures = _since([folder / "failures.json"], since_ns)
    if not failures:
        return ""
    without = json.loads(failures[0].read_text())["listings_without_vector"]
    left = f", {without} listings without (without_vector.parquet)" if without else ""
    return f"{parquet.rows([folder / 'listing_vectors.parquet'])} listing vectors{left} -> {folder}"


def _load(since_ns: int) -> str:
    receipt = _since([RESULTS / "load" / "receipt.json"], since_ns)
    return loaded(json.loads(receipt[0].read_text())) if receipt else ""


def _benchmark(since_ns: int) -> str:
    report = _since([RESULTS / "benchmark" / "benchmark.json"], since_ns)
    if not report:
        return ""
    found = json.loads(report[0].read_text())
    rate = f"{found['images_per_second']:.1f} images/s"
    return f"{rate}, bound by {found['binding_stage']} -> {report[0]}"


def _evaluate(since_ns: int) -> str:
    report = _since([RESULTS / "evaluate" / "evaluate.json"], since_ns)
    if not report:
        return ""
    found = json.loads(report[0].read_text())
    figure, page = found["recall_at_1"], report[0].with_name("index.html")
    return (
        f"recall@1 {figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f}),"
        f" {found['queries']} queries, {found['gallery']} listings -> {page}"
    )


def _report(since_ns: int) -> str:
    page = _since([RESULTS / "report" / "index.html"], since_ns)
    return f"-> {page[0]}" if page else ""


_TOLD: dict[str, Callable[[int], str]] = {
    "export": _export,
    "select": _select,
    "encode": _encode,
    "aggregate": _aggregate,
    "load": _load,
}


def _encode_stats(since_ns: int) -> list[dict[str, Any]]:
    """The statistics of the shards that were encoded since, with when they `ended`."""
    paths = _since(sorted((RESULTS / "encode").glob("*.json")), since_ns)
    return [json.loads(path.read_text()) | {"ended": path.stat().st_mtime} for path in paths]


def hit_rate() -> str:
    """How many images of the shards at hand needed no encode."""
    stats = _encode_stats(0)
    images = sum(shard["images"] for shard in stats)
    if not images:
        return "nothing is encoded in this folder, so no hit rate"
    saved = sum(sum(shard["saved"].values()) for shard in stats)
    return (
        f"results/encode: {saved} of {images} images were not encoded again ({saved / images:.0%})"
    )


def encoded(stats: list[dict[str, Any]]) -> str:
    """One line over all shards: encodes made, encodes saved by reason, failures by reason."""
    saved: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for shard in stats:
        saved.update(shard["saved"])
        failed.update(shard["failed"])
    parts = [f"{sum(shard['encoded'] for shard in stats)} images encoded"]
    parts += [f"{count} saved ({how})" for how, count in saved.items() if count]
    parts += [f"{count} failed ({reason})" for reason, count in failed.items()]
    waited = [(shard["seconds"], shard.get("waited_for_store") or 0.0) for shard in stats]
    seconds = sum(s for s, _ in waited)
    return ", ".join(parts) + limit(sum(s * share for s, share in waited) / max(seconds, 1e-3))


def loaded(receipt: dict[str, Any]) -> str:
    """One line of a receipt."""
    return (
        f"{receipt['inserted']} inserted, {receipt['updated']} updated,"
        f" {receipt['unchanged']} unchanged -> {receipt['table']}"
    )
