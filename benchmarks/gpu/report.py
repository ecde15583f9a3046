"""What the check found: shares of what limits it, what is not as it must be, a Markdown table."""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.check import MODEL, Figures

# The first percentile of the cosines to fp32 on a processor, at least.
COSINES = {
    "fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999, "decode_gpu": 0.9999,
    "trained, fp32": 0.9999, "trained, fp16": 0.999, "trained, bf16": 0.99,
}  # fmt: skip
GROWTH = 1.1  # of memory, from half of a shard to its end
LONG = 10_000  # images from which on memory is settled at half of them
PROOFS = ("parity", "same_bits", "out_of_memory", "memory")  # a rate that is missing is no fault


def add_shares(found: Figures) -> None:
    """To each run of the line: its share of what its tower and its decoders do alone."""
    for name, figures in found.get("line", {}).items():
        if not isinstance(figures, dict) or "error" in figures:
            continue
        model, mode, _ = name.split(", ")
        limits = {
            "tower": [f["images_per_second"] for n, f in found.get("tower", {}).items()
                      if n.startswith(f"{model} ")],
            "decoders": [rate for n, rate in found.get("decode", {}).items()
                         if n.startswith(f"{mode}, ")],
        }  # fmt: skip
        for what, rates in limits.items():
            if rates:
                figures[f"share_of_{what}"] = round(figures["images_per_second"] / max(rates), 2)


def faults(found: Figures) -> Iterator[str]:
    """What is not as it must be, a line each."""
    for step, figures in found.items():
        if "error" in figures:
            yield f"{step}: {figures['error']}"
        if step in PROOFS and "not_run" in figures:
            yield f"{step}: not run, {figures['not_run']}"
    for name, least in COSINES.items():
        p1 = found.get("parity", {}).get(name, {}).get("p1", 1.0)
        if not p1 >= least:
            yield f"parity: expected {name} at a cosine (p1) of {least} at least, found {p1}"
    for name, figures in found.get("same_bits", {}).items():
        for what, difference in figures.items() if isinstance(figures, dict) else ():
            if what != "batch_size" and difference != 0:
                yield f"same bits: expected {name} not to depend on {what}, found {difference}"
    runs = {name: run for name, run in found.get("line", {}).items() if isinstance(run, dict)}
    for name, run in runs.items():
        if "error" in run:
            yield f"{name}: {run['error']}"
    for name, run in {**runs, "out of memory": found.get("out_of_memory", {})}.items():
        if run.get("failed"):
            yield f"{name}: expected no photo to fail, found {run['failed']}"
    memory = found.get("memory", {})
    for where in ("", "gpu "):
        half, end = memory.get(f"{where}50%", 0), memory.get(f"{where}100%", 0)
        if memory.get("images", 0) >= LONG and end > half * GROWTH:
            yield f"memory: expected it flat, found {where}{half} MB at half and {end} at the end"


def markdown(found: Figures) -> Iterator[str]:
    """Every rate and cosine as a row of a table."""
    where = found.get("machine", {})
    device = where.get("gpu", "no GPU")
    yield f"Measured on {device}, {where.get('cores')} cores of {where.get('cpu')}."
    yield ""
    yield "| what | here | the other way | ratio |"
    yield "|---|---:|---:|---:|"
    for step, figures in found.items():
        if step in ("machine", "tests"):
            continue
        for name, value in figures.items():
            if name != "took_s":
                here = value.get("images_per_second") if isinstance(value, dict) else value
                other, rate = _other_way(found, step, name)
                ratio = f"{here / rate:.2f}" if rate and isinstance(here, float) else ""
                beside = f"{other} {_said(rate)} images/s" if ratio else ""
                yield f"| {step.replace('_', ' ')}: {name} | {_said(value)} | {beside} | {ratio} |"


def _other_way(found: Figures, step: str, name: str) -> tuple[str, float | None]:
    """What a rate is held against, and its images/s if that was measured."""
    if step == "decode" and not name.startswith("bare"):
        bare = "bare GPU decoder" if name.startswith("gpu") else "bare decoder, scaled, all cores"
        return "bare decoder", found["decode"].get(bare)
    if (step, name) == ("table", "images_per_second") or (
        step == "line" and name.startswith((MODEL, "toy"))
    ):
        return "plain", found.get("plain", {}).get("images_per_second")
    return "", None


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_said(v)}" for name, v in value.items())
    if isinstance(value, float) and value > 100:
        return f"{value:,.0f}"
    return f"{value:.7g}" if isinstance(value, float) else str(value)
