"""make gpu-check without a GPU: what it says, and its parts on the CPU at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

COMMAND = [sys.executable, "-m", "benchmarks.gpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so_in_a_line() -> None:
    """No traceback, and what would have been done."""
    done = subprocess.run(COMMAND, cwd=REPOSITORY, capture_output=True, text=True, check=True)

    assert done.stdout.startswith("no CUDA device here: nothing was checked of machine, tests, par")
    assert 1 == len(done.stdout.splitlines())


def test_its_parts_run_on_the_cpu(tmp_path: Path) -> None:
    """Every step but the GPU's own leaves its figures in the report, and a row in the table."""
    steps = ["machine", "parity", "same_bits", "decode", "line", "tower", "plain", "memory"]
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
    assert "| parity: fp32 |" in done.stdout
