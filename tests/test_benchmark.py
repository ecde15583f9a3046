"""What the benchmark advises: only what would move the bound, best first; and what it costs."""

from pathlib import Path
from typing import Any

import pytest
from test_encode import Shard

from pipeline import benchmark
from pipeline.encoder.processor import NO_BF16
from pipeline.stage.errors import DeviceError


@pytest.fixture
def shard(tmp_path: Path, encoder: Path) -> Shard:
    return Shard(tmp_path, encoder)


def advised(
    shard: Shard,
    monkeypatch: pytest.MonkeyPatch,
    apart: dict[str, float],
    bounds: dict[str, float] | None = None,
    **chosen: Any,
) -> dict[str, float]:
    """The advice for 1000 photos that took so many seconds apart; others decode in 40 and 4 s.

    Once it has begun: each takes ten minutes to begin. `bounds` are those of other precisions.
    """
    took = {"scaled": [600.0, 40.0], "gpu": [600.0, 4.0]}
    job = shard.job(**chosen)
    vars(job)["encoder"] = None  # not asked for

    def time_apart(paths: list[str], job: Any, *_: Any, **__: Any) -> dict[str, float]:
        return {"decode": took[job.chosen.decode].pop(0) * len(paths) / 1000}

    monkeypatch.setattr(benchmark, "time_apart", time_apart)
    compared = {name: {"bound_images_per_second": rate} for name, rate in (bounds or {}).items()}
    return benchmark.advice(["a.jpg"] * 1000, job, apart, compared)


def test_on_a_gpu_the_slowest_stage_counts(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding binds: the GPU's decoder is first, then more threads, then shrinking."""
    monkeypatch.setattr("pipeline.encoder.model._cuda_devices", lambda: 1)
    apart = {"read": 1.0, "decode": 60.0, "encode": 10.0}

    found = advised(shard, monkeypatch, apart, device="cuda", num_workers=1)

    assert [("decode: gpu", 100), ("num_workers: auto", 33.33), ("decode: scaled", 25)] == [
        *found.items()
    ]


def test_a_decoder_that_fails_is_left_out(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU without a JPEG decoder is measured all the same, and the log says what is not."""
    monkeypatch.setattr("pipeline.encoder.model._cuda_devices", lambda: 1)
    job = shard.job(device="cuda", num_workers=1)
    vars(job)["encoder"] = None  # not asked for

    def time_apart(paths: list[str], job: Any, *_: Any, **__: Any) -> dict[str, float]:
        if job.chosen.decode == "gpu":
            raise DeviceError("a GPU that decodes JPEGs", "none")
        return {"decode": 40.0 * len(paths) / 1000}

    monkeypatch.setattr(benchmark, "time_apart", time_apart)
    apart = {"read": 1.0, "decode": 60.0, "encode": 10.0}
    found = benchmark.advice(["a.jpg"] * 1000, job, apart, {})

    assert {"num_workers: auto", "decode: scaled"} == found.keys()
    assert (
        "decode gpu is not compared: expected a GPU that decodes JPEGs, found none" in caplog.text
    )


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


def test_a_precision_is_advised_by_its_bound(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configured precision and one that brings less than a tenth are not."""
    apart = {"read": 0.0, "decode": 20.0, "encode": 80.0}
    bounds = {"fp32": 10.0, "bf16": 16.7, "fp16": 10.5}

    assert {"precision: bf16": 16.7} == advised(shard, monkeypatch, apart, bounds, decode="scaled")


def reported(shard: Shard) -> tuple[dict[str, Any], list[str]]:
    """The report of a benchmark of some photos, one of them broken, and its table."""
    paths: list[str | None] = [shard.photo(f"{n}.jpg", n) for n in range(8)]
    (shard.photos / "3.jpg").write_bytes(b"no photo")
    job = shard.job()
    report = benchmark.benchmark(shard.write(paths), job.chosen, job)
    return report, [*benchmark.table(report)]


def test_precisions_are_compared_where_bf16_is_fast(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each brings and what it costs, on the photos that can be read."""
    monkeypatch.setattr("pipeline.encoder.model.has_bf16", lambda: True)
    monkeypatch.setattr(benchmark, "has_bf16", lambda: True)
    report, lines = reported(shard)
    fp32, bf16 = report["precisions"]["fp32"], report["precisions"]["bf16"]

    assert ["fp32", "bf16"] == [*report["precisions"]]
    assert 7 == fp32["images_compared"] == bf16["images_compared"]
    assert 1 == round(fp32["cosine_min"], 5)
    assert 0.999 < bf16["cosine_min"] <= bf16["cosine_p1"] <= bf16["cosine_p50"] < 1
    assert fp32["bound_images_per_second"] == report["bound_images_per_second"]
    assert lines[-2].startswith("bf16: ")
    assert f"of 7 photos: median {bf16['cosine_p50']:.5f}" in lines[-2]
    assert "snakemake evaluate" in lines[-1]


def test_a_processor_without_bf16_gets_one_line(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is loaded or compared there."""
    monkeypatch.setattr("pipeline.encoder.model.has_bf16", lambda: False)
    monkeypatch.setattr(benchmark, "has_bf16", lambda: False)
    report, lines = reported(shard)

    assert {} == report["precisions"]
    assert [NO_BF16] == [line for line in lines if "bf16" in line]


def test_a_precision_that_the_device_fails_in_is_left_out(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The benchmark goes on without it, and says why."""

    def fail(*_: Any) -> None:
        raise DeviceError("memory for a batch", "none left")

    monkeypatch.setattr("pipeline.encoder.model.has_bf16", lambda: True)
    monkeypatch.setattr(benchmark, "_side_by_side", fail)
    report, _ = reported(shard)

    assert {} == report["precisions"]
    assert "precision bf16 is not compared: expected memory for a batch" in caplog.text
