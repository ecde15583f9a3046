"""A projection of listing vectors onto the directions in which they differ most: PCA, in a file.

The file is Parquet, for anyone to open: the mean is component 0, the others follow by the variance
along them. Its metadata says which encoder's vectors it was fitted on. Its identity is the hash of
its bytes, which hold no path and no time.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.encoder.model import NEVER_MIXED
from pipeline.stage import parquet
from pipeline.stage.errors import DataError, ModelError, SettingsError

Numbers = npt.NDArray[np.float64]

_FIT = "python -m pipeline pca fit"


@dataclass(frozen=True)
class Fit:
    """What was found in `rows` vectors of length `of`; variances are per degree of freedom."""

    mean: Numbers  # (of,)
    components: Numbers  # (dimensions, of): orthonormal rows, largest variance first
    explained_variance: Numbers  # (dimensions,)
    total_variance: float  # along all directions
    rows: int

    def kept(self, dimensions: int) -> float:
        """The share of the variance along the first so many components, 0 to 1."""
        return float(self.explained_variance[:dimensions].sum() / self.total_variance)


@dataclass(frozen=True)
class Projection:
    """A fit as it was read, with the encoder and the vectors that it was fitted on."""

    fit: Fit
    encoder: Mapping[str, Any]  # NEVER_MIXED of its fingerprint
    fitted_on: Mapping[str, Any]
    digest: str  # SHA-256 of the file
    rev: str  # what pca_rev is by default: the file's name and the start of the digest

    @property
    def dimensions(self) -> int:
        """Of what comes out."""
        return len(self.fit.components)

    @property
    def of(self) -> int:
        """The dimension of what goes in."""
        return len(self.fit.mean)

    def apply(self, vectors: npt.NDArray[np.floating]) -> Numbers:
        """(rows, of) to float64 (rows, dimensions), not of unit length."""
        projected: Numbers = (vectors - self.fit.mean) @ self.fit.components.T
        return projected

    def check(self, encoder: Mapping[str, Any], dimension: int | None) -> None:
        """ModelError unless vectors of this encoder are those that it was fitted on.

        `encoder` has a Fingerprint's fields; `dimension` is None where only the weights say it.
        """
        unlike = [f"another {p}" for p in NEVER_MIXED if encoder.get(p) != self.encoder.get(p)]
        if dimension not in (None, self.of):
            unlike.append(f"{dimension} dimensions instead of {self.of}")
        if unlike:
            raise ModelError(
                "the encoder on whose vectors the projection was fitted",
                " and ".join(unlike), f"pca: {self.rev}", f"fit one on its own vectors: {_FIT}",
            )  # fmt: skip


class Moments:
    """What a fit needs of vectors of length `of`: memory is that of two matrices (of, of)."""

    def __init__(self, of: int) -> None:
        self.rows = 0
        self._sums, self._products = np.zeros(of), np.zeros((of, of))

    def add(self, vectors: npt.NDArray[np.floating]) -> None:
        """Some more, (rows, of)."""
        block = vectors.astype(np.float64)
        self.rows += len(block)
        self._sums += block.sum(axis=0)
        self._products += block.T @ block

    def fit(self, dimensions: int) -> Fit:
        """The mean and the first principal components of two vectors or more.

        Of each component the element that is largest by its amount is positive.
        """
        mean = self._sums / self.rows
        covariance = (self._products - self.rows * np.outer(mean, mean)) / (self.rows - 1)
        variances, columns = np.linalg.eigh(covariance)
        components = columns.T[::-1][:dimensions]
        largest = np.abs(components).argmax(axis=1)
        signs = np.sign(components[np.arange(dimensions), largest])
        explained = np.maximum(variances[::-1][:dimensions], 0)
        total = np.trace(covariance)
        return Fit(mean, components * signs[:, np.newaxis], explained, total, self.rows)


def fit(batches: Iterable[npt.NDArray[np.floating]], dimensions: int) -> Fit:
    """The fit of vectors that are given as (rows, of) at a time.

    SettingsError: more dimensions than the vectors have; DataError: no more vectors than
    dimensions, or some that are not finite.
    """
    moments = Moments(0)
    for batch in batches:
        if not moments.rows:
            of = batch.shape[1]
            if dimensions > of:
                raise SettingsError(f"--dimensions, {of} at most", str(dimensions), "command line")
            moments = Moments(of)
        if not np.isfinite(batch).all():
            raise DataError("finite vectors to fit on", "others among them")
        moments.add(batch)
    if moments.rows <= dimensions:
        raise DataError(
            f"more vectors than the {dimensions} dimensions to fit", str(moments.rows), "",
            "ask for fewer --dimensions, or embed more listings first",
        )  # fmt: skip
    return moments.fit(dimensions)


def _schema(of: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("component", pa.int32()),  # 0: the mean
            pa.field("explained_variance", pa.float64()),  # null for the mean
            pa.field("vec", pa.list_(pa.float64(), of)),
        ]
    )


def write(
    path: Path, found: Fit, encoder: Mapping[str, Any], fitted_on: Mapping[str, Any]
) -> Projection:
    """Write the file, whole or not at all; the same fit, the same bytes. Returns it as read."""
    numbers = np.vstack([found.mean, found.components])
    table = pa.table(
        {
            "component": np.arange(len(numbers), dtype=np.int32),
            "explained_variance": [None, *found.explained_variance.tolist()],
            "vec": pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), len(found.mean)),
        },
        schema=_schema(len(found.mean)),
    )
    made_by = {
        "encoder": {part: encoder.get(part) for part in NEVER_MIXED},
        "projection": {
            "total_variance": found.total_variance,
            "rows": found.rows,
            "fitted_on": fitted_on,
        },
    }
    with parquet.writer(path, table.schema, made_by) as writer:
        writer.write_table(table)
    return read(path)


def read(path: Path, expected: str = "") -> Projection:
    """The projection of a file. ModelError: it is missing, damaged, or something else.

    `expected` is the digest of the file that was meant, where that is known.
    """
    try:
        made_by = parquet.metadata(path)  # its footer first: another file may be large
        projection, encoder = made_by["projection"], dict(made_by["encoder"])
        data = path.read_bytes()
        found = _fit(data, float(projection["total_variance"]), int(projection["rows"]))
        fitted_on = dict(projection["fitted_on"])
    except Exception as error:  # noqa: BLE001  what is no such file may fail in any way
        number = getattr(error, "errno", None)
        said = os.strerror(number).lower() if number else "another file, or a damaged one"
        raise ModelError(f"a projection, made by {_FIT}", said, f"pca: {path}") from None
    digest = hashlib.sha256(data).hexdigest()
    if expected and digest != expected:
        raise ModelError(
            f"the projection {expected[:12]}", digest[:12], f"pca: {path}",
            "it changed since the workflow was planned; run it again",
        )  # fmt: skip
    return Projection(found, encoder, fitted_on, digest, f"{path.stem}/{digest[:12]}")


def _fit(data: bytes, total_variance: float, rows: int) -> Fit:
    """The numbers in the bytes of a file; raises whatever its damage raises."""
    # No threads of Arrow's: one that lets go of Python's bytes as the process ends aborts it.
    buffer = pa.BufferReader(data)
    with pq.ParquetFile(buffer, pre_buffer=False, page_checksum_verification=True) as file:
        table = file.read(use_threads=False)
    of = parquet.dimension(table.schema)
    numbers = table["vec"].combine_chunks().flatten().to_numpy().reshape(-1, of)
    if not table.schema.equals(_schema(of)) or len(numbers) < 2 or not np.isfinite(numbers).all():
        raise ValueError("other columns or numbers")
    explained = table["explained_variance"].to_numpy()[1:]
    return Fit(numbers[0], numbers[1:], explained, total_variance, rows)
