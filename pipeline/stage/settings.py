"""Every setting of a job: config.yaml (and --config), the environment, and stage flags.

Defaults, ranges and one-line descriptions live here; config.yaml repeats the defaults for its
readers and a test holds the two together.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.stage.errors import SettingsError

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

URL = re.compile(r"(?i)[a-z][a-z0-9+.-]*://")
STORES = ("s3", "gs", "az", "https", "http")

MOST_SHARDS = 10_000

CONFIG = Path("config.yaml")
CHECKOUT = Path(__file__).parents[2]

# Variables of the environment, which some look for in config.yaml.
VARIABLES = (
    "PG_DSN", "IMAGE_ROOT_DIR", "IMAGE_FEATURE_VERSION", "LISTINGS_SCHEMA", "LISTINGS_TABLE",
    "ASSETS_SCHEMA", "ASSETS_TABLE", "ML_SCHEMA", "IMAGE_FEATURES_TABLE", "VECTORS_TABLE",
)  # fmt: skip

# What of a photo may be read; a photo that was refused by them is tried again when they change.
PHOTO_LIMITS = ("follow_symlinks", "max_image_bytes", "max_image_pixels")


class Identity(NamedTuple):
    """The part of the target's key that the settings decide, beside the listing and its edit."""

    source: str
    model_rev: str
    pca_rev: str

    def __str__(self) -> str:
        return " · ".join(part or "''" for part in self)


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
        "", description="key: which recipe made the vectors; empty: listing_images_topk<topk>_v1"
    )
    model_rev: str = Field("", description="key: which encoder; empty: <model_name>/<pretrained>")
    pca_rev: str = Field(
        "", description="key: which projection came after; empty: the file of pca, or none"
    )
    pca: str = Field("", description="file of `pca fit` that projects the vectors; empty: none")

    batch_size: int = Field(96, ge=1, le=4096, description="images per forward pass, at most")
    num_workers: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        6, description="decoding threads beside a GPU, at most one a core; auto: one a core"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N"
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="auto: fp16 on CUDA, else fp32"
    )
    decode: Literal["full", "scaled", "gpu"] = Field(
        "full",
        description="full: every pixel; scaled: JPEG shrunk while decoding; gpu: on the GPU",
    )
    apply_exif_orientation: bool = Field(True, description="encode photos as people see them")

    max_failed_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="a run stops for a wrong IMAGE_ROOT_DIR if a larger share of the newest"
        " listings with a vector has no photo left, or no photo of the run is there; 1: never",
    )
    follow_symlinks: bool = Field(False, description="allow symlinks below the image root")
    max_image_bytes: int = Field(
        64 * 2**20, ge=1, description="bytes; a larger file is that image's error"
    )
    max_image_pixels: int = Field(
        80_000_000, ge=1, description="pixels; a larger image is that image's error"
    )

    benchmark_images: int = Field(2000, ge=1, description="images that the benchmark reads")
    shards: Annotated[int, Field(ge=1, le=MOST_SHARDS)] | Literal["auto"] = Field(
        "auto", description="parts that can be encoded side by side; auto: one for 10,000 photos"
    )
    cache_dir: str = Field("cache", min_length=1, description="folder of the vector cache")
    memory_mb: int = Field(
        1024, ge=128, description="megabytes for DuckDB when it aggregates (it spills beyond)"
    )
    lock_timeout_s: int = Field(
        60, ge=1, le=86_400, description="seconds to wait for a lock on the target table"
    )

    @property
    def identity(self) -> Identity:
        """The key's part as these settings name it; see identity_of for what is left empty."""
        source = self.source or f"listing_images_topk{self.topk}_v1"
        return Identity(source, self.model_rev, self.pca_rev)

    @property
    def recipe(self) -> dict[str, Any]:
        """What beside the encoder makes a listing's vector; the registry keeps it for each key.

        The digest of a projection is filled in by who has read the file of `pca`.
        """
        return {
            "topk": self.topk,
            "exclude_stock": self.exclude_stock,
            "exclude_screenshots": self.exclude_screenshots,
            "projection": "",
        }

    @field_validator(*Identity._fields, "model_name", "pretrained", "pca", "cache_dir", "device")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("Input should be printable text on one line")
        return value

    @classmethod
    def check(
        cls, values: Mapping[str, Any], where: str = str(CONFIG), given: Collection[str] = ()
    ) -> Self:
        """Settings from untrusted values; SettingsError names the first bad key.

        The keys in `given` came from --config, the others from `where`.
        """

        def origin(key: str) -> str:
            return "--config" if key in given else where

        for key in values:
            if key not in cls.model_fields:
                raise _unknown_key(str(key), origin(key))
        try:
            return cls(**values)
        except ValidationError as error:
            raise _bad_value(error, origin) from None


def _unknown_key(key: str, where: str) -> SettingsError:
    close = difflib.get_close_matches(key, Settings.model_fields, n=1)
    hint = f"did you mean {close[0]}?" if close else "config.yaml lists every key"
    if key.upper() in VARIABLES:
        hint = f"it is a variable of the environment: export {key.upper()}=..."
    return SettingsError("a known setting", repr(key), where, hint)


def _bad_value(error: ValidationError, origin: Callable[[str], str]) -> SettingsError:
    first, *others = error.errors(include_url=False)
    key = str(first["loc"][0])
    messages = [e["msg"] for e in (first, *others) if e["loc"][0] == key]  # one for each type
    expected = " or ".join(re.sub(r"^(Value error, )?Input should be ", "", m) for m in messages)
    field = Settings.model_fields[key]
    return SettingsError(
        f"{key}: {expected}",
        repr(first["input"]),
        origin(key),
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


def under_key(chosen: Settings, args: argparse.Namespace) -> Settings:
    """The settings with the parts of the key that a command's flags name.

    An empty --pca-rev is the key of vectors as they were encoded.
    """
    named = {n: getattr(args, n) for n in Identity._fields if getattr(args, n) is not None}
    if named.get("pca_rev") == "":
        named["pca"] = ""
    return chosen.model_copy(update=named)


def from_flags(args: argparse.Namespace) -> Settings:
    """The settings among a stage's parsed flags; the others keep their defaults."""
    return Settings.check(
        {k: v for k, v in vars(args).items() if k in Settings.model_fields}, "command line"
    )


class Environment(BaseModel):
    """What the environment says: where the data are. PG_DSN itself is never stored or shown."""

    model_config = ConfigDict(frozen=True)

    image_root: Path | str  # a folder, or the URL of an object store
    feature_version: int
    listings: tuple[str, str]
    images: tuple[str, str]
    features: tuple[str, str]
    features_named: bool  # by IMAGE_FEATURES_TABLE: then it is no longer optional
    vectors: tuple[str, str]

    @property
    def registry(self) -> tuple[str, str]:
        """The registry of encoders: `<vectors table>_encoders` in the same schema."""
        return self._beside("encoders")

    @property
    def current(self) -> tuple[str, str]:
        """The view of the vectors of live listings: `<vectors table>_current`."""
        return self._beside("current")

    @property
    def as_of(self) -> tuple[str, str]:
        """The function of the vectors of a moment: `<vectors table>_as_of`."""
        return self._beside("as_of")

    def _beside(self, what: str) -> tuple[str, str]:
        schema, table = self.vectors
        return schema, f"{table[:54]}_{what}"

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The environment with its defaults; SettingsError names the first bad variable."""
        listings_schema = _identifier(environ, "LISTINGS_SCHEMA", "iPhone")
        assets_schema = _identifier(environ, "ASSETS_SCHEMA", "iPhone")
        ml_schema = _identifier(environ, "ML_SCHEMA", "ml")
        return cls(
            image_root=_image_root(environ.get("IMAGE_ROOT_DIR") or "listing_images"),
            feature_version=_integer(environ, "IMAGE_FEATURE_VERSION", 1),
            listings=(listings_schema, _identifier(environ, "LISTINGS_TABLE", "iphone_listings")),
            images=(assets_schema, _identifier(environ, "ASSETS_TABLE", "iphone_image_assets")),
            features=(
                ml_schema,
                _identifier(environ, "IMAGE_FEATURES_TABLE", "iphone_image_features_v1"),
            ),
            features_named=bool(environ.get("IMAGE_FEATURES_TABLE")),
            vectors=(ml_schema, _identifier(environ, "VECTORS_TABLE", "img_vec512_v1")),
        )


def is_url(image_root: str) -> bool:
    """Whether it begins with a scheme, as s3:// is."""
    return URL.match(image_root) is not None


def _image_root(value: str) -> Path | str:
    """A folder, or a URL without anything secret in it; SettingsError: another URL."""
    if not is_url(value):
        return Path(value)
    scheme, _, rest = value.partition("://")
    if scheme not in STORES or not rest.partition("/")[0]:
        raise SettingsError(
            "IMAGE_ROOT_DIR: a folder, or a URL such as s3://bucket/prefix",
            f"one that begins with {scheme}://", "environment",
            f"object stores are {', '.join(f'{name}://' for name in STORES)}",
        )  # fmt: skip
    if re.search(r"[@?#]", rest) or not rest.isprintable():
        raise SettingsError(
            "IMAGE_ROOT_DIR: a URL of scheme, bucket and prefix alone",
            "an '@', '?', '#' or control character in it", "environment",
            "credentials go into variables of the environment, such as AWS_ACCESS_KEY_ID",
        )  # fmt: skip
    if {"", ".", ".."} & {*rest.rstrip("/").split("/")}:
        raise SettingsError(
            "IMAGE_ROOT_DIR: a URL of a bucket and a plain prefix",
            "an empty part, '.' or '..' between its slashes", "environment",
            "write the prefix as the names of the objects begin",
        )  # fmt: skip
    return value


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


def find_config() -> Path | None:
    """The config.yaml of this folder, else the one beside the Snakefile; None if there is neither.

    Where it is not this folder's, a line on stderr says so, and where the results go.
    """
    if CONFIG.exists():
        return CONFIG
    beside = CHECKOUT / CONFIG
    found = beside if beside.exists() else None
    print(
        f"no config.yaml in this folder: settings are {found or 'the defaults'},"
        f" results go to {Path.cwd() / 'results'}",
        file=sys.stderr,
        flush=True,
    )
    return found


def config_values(path: Path) -> dict[str, Any]:
    """What a config.yaml says, unchecked; SettingsError where it is no mapping in YAML."""
    try:
        values = _yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or "bytes that are not UTF-8"
        raise SettingsError("a file of settings", found.lower(), str(path)) from None
    if isinstance(values, dict):
        return values
    found = {type(None): "nothing", list: "a list"}.get(type(values), f"the text {str(values)!r}")
    raise SettingsError("settings as KEY: VALUE, one a line", found, str(path), _YAML_HINT)


_YAML_HINT = (
    "as in 'topk: 5', with a blank after the colon; without this file, the settings are those of"
    " the config.yaml beside the Snakefile"
)


def read_config(overrides: Sequence[str] = (), path: Path | None = None) -> Settings:
    """The settings as Snakemake would see them: config.yaml, then KEY=VALUE overrides."""
    path = path or find_config()
    values = {} if path is None else config_values(path)
    given = dict(_override(text) for text in overrides)
    return Settings.check({**values, **given}, str(path or CONFIG), given)


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise SettingsError("KEY=VALUE", repr(text), "--config", "as in --config topk=3")
    return key, _yaml(value, "--config") if value else ""


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        found = getattr(error, "problem", None) or " ".join(str(error).split())
        hint = "a setting is KEY: VALUE, with a blank after the colon and without tabs"
        raise SettingsError("YAML", str(found), place, hint) from None
