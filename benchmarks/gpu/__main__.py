"""All about the GPU at once: is it right, how fast is it, and what limits it.

One JSON file, written after each step, and a Markdown table; a figure that is not as it must be is
a line of its own, and the exit code 1. What to expect: a tower's rate grows with the batch until
the card is full; files to vectors go at the rate of the slowest of decoders, tower and Python, and
Python's lock is why several processes share a card. Weights are from a seed.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import measure
from benchmarks.gpu import line, rates, right
from benchmarks.gpu.check import Check, Figures, collect, smi
from benchmarks.gpu.report import add_shares, faults, markdown
from pipeline.encoder.claim import wait_asleep

# What matters most comes first: no step begins once the time is over.
STEPS = (
    right.machine, right.tests, right.parity, right.same_bits, right.out_of_memory, line.memory,
    rates.decode, line.line, rates.tower, rates.plain, rates.table, rates.compiled,
)  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        skip(args.steps)
        return
    if args.device != "cpu":
        args.device = f"cuda:{args.device.partition(':')[2] or 0}"  # the same for all processes
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="gpu-check-", dir=args.work) as folder:
        sys.exit(run(Check(args, Path(folder)), args))


def parse_args() -> argparse.Namespace:
    names = [step.__name__ for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", nargs="+", default=names, choices=names)
    parser.add_argument("--lines", nargs="+", help="runs of the line: MODEL:DECODE:PROCESSES")
    parser.add_argument("--report", type=Path, default=Path("results/gpu-check.json"))
    parser.add_argument("--work", type=Path, help="where the files lie for the time (7 GB)")
    parser.add_argument("--photos", type=Path, help="folder of real photos, beside drawn ones")
    parser.add_argument("--images", type=int, default=16_000, help="2-megapixel files to encode")
    parser.add_argument("--small", type=int, default=60_000, help="files of the memory step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores to use")
    parser.add_argument("--seconds", type=float, default=1.0, help="that each rate is measured")
    parser.add_argument("--minutes", type=float, default=7, help="after which no step begins")
    parser.add_argument("--device", default="cuda", help="cpu: what can be tried without a GPU")
    parser.add_argument("--toy", action="store_true", help="a tiny encoder, few photos")
    return parser.parse_args()


def skip(steps: list[str]) -> None:
    """Say that there is no CUDA; SystemExit where the driver knows of a GPU all the same."""
    if card := smi("name"):
        raise SystemExit(
            f"error: expected a torch that can use {card}, found {torch.__version__}, which cannot;"
            f" hint: install one that is built for driver {smi('driver_version')}"
        )
    print(f"no CUDA device here: nothing was checked of {', '.join(steps)}")


def run(check: Check, args: argparse.Namespace) -> int:
    """The steps one after the other; 1 if one failed. The report is whole after each."""
    wait_asleep(args.device)
    if check.on_gpu:
        torch.cuda.set_device(args.device)
    torch.set_num_threads(1)  # this and the next as load_encoder has them
    torch.backends.cudnn.allow_tf32 = False
    begun = time.monotonic()
    args.report.parent.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        if step.__name__ not in args.steps:
            continue
        start = time.monotonic()
        figures: Figures = {"not_run": f"{args.minutes:g} minutes were over; hint: --minutes"}
        if start - begun < args.minutes * 60:
            try:
                collect()
                figures = step(check)
            except Exception as error:  # noqa: BLE001  one step's failure is no other's
                figures = {"error": f"{type(error).__name__}: {error}"}
        figures["took_s"] = round(time.monotonic() - start, 1)
        check.found[step.__name__] = figures
        add_shares(check.found)
        measure.say(f"{step.__name__}: {json.dumps(figures, default=float)}")
        args.report.write_text(json.dumps(check.found, indent=1, default=float) + "\n")
    print("\n".join(markdown(check.found)))
    found = [*faults(check.found)]
    for fault in found:
        measure.say(f"error: {fault}")
    measure.say(f"{time.monotonic() - begun:.0f} s in all; {args.report}")
    return min(1, len(found))


if __name__ == "__main__":
    main()
