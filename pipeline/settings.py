"""Every setting of a job: config.yaml (and --config), the environment, and stage flags.

Defaults, ranges and one-line descriptions live here; config.yaml repeats the defaults for its
readers and a test holds the two together.
"""

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import SettingsError

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Settings(BaseModel):
    """The keys of config.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    limit_listings: int = Field(50_000, ge=1, description="listings per run, newest first")
    topk: int = Field(5, ge=1, le=127, description="images per listing, best score first")
    force: bool = Field(False, description="embed every eligible listing again, without the cache")
    exclude_stock: bool = Field(True, description="leave out stock photos")
    exclude_screenshots: bool = Field(True, description="leave out battery screenshots")

    model_name: str = Field(
        "ViT-B-32", min_length=1, description="open_clip model, or local-dir:FOLDER"
    )
    pretrained: str = Field(
        "laion2b_s34b_b79k", description="open_clip weights tag, or a weights file"
    )
    source: str = Field(
        "listing_images_topk5_v1", min_length=1, description="key: which recipe made the vectors"
    )
    model_rev: str = Field("", description="key: which encoder; empty: <model_name>/<pretrained>")
    pca_rev: str = Field("", description="key: which projection came after; empty: none")

    batch_size: int = Field(96, ge=1, le=4096, description="images per forward pass, at most")
    num_workers: int = Field(
        6, ge=1, le=256, description="decoding threads beside a GPU, at most one a core"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N"
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="auto: fp16 on CUDA, else fp32"
    )
    decode: Literal["full", "scaled"] = Field(
        "full", description="full: every pixel; scaled: JPEG shrunk while decoding"
    )
    apply_exif_orientation: bool = Field(True, description="encode photos as people see them")

    max_failed_fraction: float = Field(
        0.5, ge=0, le=1, description="stop before the load above this share of failed images"
    )
    follow_symlinks: bool = Field(False, description="allow symlinks below the image root")
    max_image_bytes: int = Field(
        64 * 2**20, ge=1, description="bytes; a larger file is that image's error"
    )
    max_image_pixels: int = Field(
        80_000_000, ge=1, description="pixels; a larger image is that image's error"
    )

    benchmark_images: int = Field(2000, ge=1, description="images that the benchmark reads")
    shards: int = Field(4, ge=1, le=10_000, description="parts that can be encoded side by side")
    cache_dir: str = Field("cache", min_length=1, description="folder of the vector cache")
    memory_mb: int = Field(
        1024, ge=128, description="megabytes for DuckDB when it aggregates (it spills beyond)"
    )
    lock_timeout_s: int = Field(
        60, ge=1, le=86_400, description="seconds to wait for a lock on the target table"
    )

    @field_validator(
        "source", "model_rev", "pca_rev", "model_name", "pretrained", "cache_dir", "device"
    )
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("Input should be printable text on one line")
        return value

    @classmethod
    def check(cls, values: Mapping[str, Any], where: str = "config.yaml") -> Self:
        """Settings from untrusted values; SettingsError names the first bad key."""
        for key in values:
            if key not in cls.model_fields:
                close = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"did you mean {close[0]}?" if close else "config.yaml lists every key"
                raise SettingsError("a known setting", repr(key), where, hint)
        try:
            return cls(**values)
        except ValidationError as error:
            raise _bad_value(error, where) from None


def _bad_value(error: ValidationError, where: str) -> SettingsError:
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    expected = re.sub(r"^(Value error, )?Input should be ", "", first["msg"])
    field = Settings.model_fields[key]
    return SettingsError(
        f"{key}: {expected}",
        repr(first["input"]),
        where,
        f"{key} is: {field.description} (default {field.default!r})",
    )


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Give a stage's parser a flag for each named setting: --max-image-bytes and so on."""
    for name in names:
        field = Settings.model_fields[name]
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=field.default,
            choices=choices,
            metavar=None if choices else _metavar(field.annotation),
            help=field.description,
        )


def _metavar(annotation: Any) -> str:
    return {int: "N", float: "X", bool: "true|false"}.get(annotation, "TEXT")


def from_flags(args: argparse.Namespace) -> Settings:
    """The settings among a stage's parsed flags; the others keep their defaults."""
    return Settings.check(
        {k: v for k, v in vars(args).items() if k in Settings.model_fields}, "command line"
    )


class Environment(BaseModel):
    """What the environment says: where the data are. PG_DSN itself is never stored or shown."""

    model_config = ConfigDict(frozen=True)

    image_root: Path
    feature_version: int
    listings: tuple[str, str]
    images: tuple[str, str]
    features: tuple[str, str]
    vectors: tuple[str, str]

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The environment with its defaults; SettingsError names the first bad variable."""
        listings_schema = _identifier(environ, "LISTINGS_SCHEMA", "iPhone")
        assets_schema = _identifier(environ, "ASSETS_SCHEMA", "iPhone")
        ml_schema = _identifier(environ, "ML_SCHEMA", "ml")
        return cls(
            image_root=Path(environ.get("IMAGE_ROOT_DIR") or "listing_images"),
            feature_version=_integer(environ, "IMAGE_FEATURE_VERSION", 1),
            listings=(listings_schema, _identifier(environ, "LISTINGS_TABLE", "iphone_listings")),
            images=(assets_schema, _identifier(environ, "ASSETS_TABLE", "iphone_image_assets")),
            features=(
                ml_schema,
                _identifier(environ, "IMAGE_FEATURES_TABLE", "iphone_image_features_v1"),
            ),
            vectors=(ml_schema, _identifier(environ, "VECTORS_TABLE", "img_vec512_v1")),
        )


def _identifier(environ: Mapping[str, str], name: str, default: str) -> str:
    hint = f"a view under a plain name will do; default {default}"
    return identifier(name, environ.get(name) or default, "environment", hint)


def identifier(name: str, value: str, where: str = "command line", hint: str = "") -> str:
    """A value that may stand between double quotes in SQL; SettingsError for any other."""
    if not IDENTIFIER.fullmatch(value) or len(value) > 63:
        raise SettingsError(
            f"{name}: a name of letters, digits and _ that starts with no digit, 63 at most",
            repr(value),
            where,
            hint,
        )
    return value


def _integer(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name) or str(default)
    if not re.fullmatch(r"-?\d{1,9}", value):
        raise SettingsError(f"{name}: a whole number", repr(value), "environment")
    return int(value)


def read_config(overrides: Sequence[str] = (), path: Path = Path("config.yaml")) -> Settings:
    """The settings as Snakemake would see them: config.yaml, then KEY=VALUE overrides."""
    values: dict[str, Any] = {}
    if path.exists():
        values = _yaml(path.read_text(), str(path)) or {}
    for override in overrides:
        key, _, value = override.partition("=")
        values[key] = _yaml(value, "command line") if value else ""
    return Settings.check(values, "config.yaml or command line")


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError("YAML", " ".join(str(error).split()), where) from None
