"""What the benchmark advises: only what would move the bound, best first."""

from pathlib import Path
from typing import Any

import pytest
from test_encode import Shard

from pipeline import benchmark


@pytest.fixture
def shard(tmp_path: Path, encoder: Path) -> Shard:
    return Shard(tmp_path, encoder)


def advised(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, apart: dict[str, float], **chosen: Any
) -> dict[str, float]:
    """The advice for 1000 photos that took so many seconds apart; others decode in 40 and 4 s."""
    took = {"scaled": 40.0, "gpu": 4.0}
    job = shard.job(**chosen)
    vars(job)["encoder"] = None  # not asked for

    def time_apart(paths: list[str], job: Any, *_: Any, **__: Any) -> dict[str, float]:
        return {"decode": took[job.chosen.decode] * len(paths) / 1000}

    monkeypatch.setattr(benchmark, "time_apart", time_apart)
    return benchmark.advice(["a.jpg"] * 1000, job, apart)


def test_on_a_gpu_the_slowest_stage_counts(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding binds: the GPU's decoder is first, then more threads, then shrinking."""
    monkeypatch.setattr("pipeline.encoder.model._cuda_devices", lambda: 1)
    apart = {"read": 1.0, "decode": 60.0, "encode": 10.0}

    found = advised(shard, monkeypatch, apart, device="cuda", num_workers=1)

    assert [("decode: gpu", 100), ("num_workers: auto", 33.33), ("decode: scaled", 25)] == [
        *found.items()
    ]


def test_where_the_encoder_binds_nothing_is_advised(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faster decoding behind a slower encoder brings nothing."""
    monkeypatch.setattr("pipeline.encoder.model._cuda_devices", lambda: 1)
    apart = {"read": 1.0, "decode": 60.0, "encode": 100.0}

    assert {} == advised(shard, monkeypatch, apart, device="cuda", num_workers=1)


def test_on_a_processor_all_stages_count(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages share the cores: what decoding saves is saved, if it is a tenth of all."""
    apart = {"read": 0.0, "decode": 60.0, "encode": 40.0}
    slow_encoder = {"read": 0.0, "decode": 60.0, "encode": 400.0}

    assert {"decode: scaled": 12.5} == advised(shard, monkeypatch, apart)
    assert {} == advised(shard, monkeypatch, slow_encoder)
    assert {} == advised(shard, monkeypatch, apart, decode="scaled")
