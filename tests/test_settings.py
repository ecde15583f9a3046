"""Settings: one set of names and defaults everywhere, and one line for what is wrong."""

import argparse
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from pipeline import run, settings
from pipeline.errors import SettingsError
from pipeline.settings import Environment, Settings

DEFAULTS: dict[str, Any] = {
    "limit_listings": 50000,
    "topk": 5,
    "force": False,
    "exclude_stock": True,
    "exclude_screenshots": True,
    "model_name": "ViT-B-32",
    "pretrained": "laion2b_s34b_b79k",
    "source": "listing_images_topk5_v1",
    "model_rev": "",
    "pca_rev": "",
    "batch_size": 96,
    "num_workers": 6,
    "device": "auto",
    "precision": "auto",
    "decode": "full",
    "apply_exif_orientation": True,
    "max_failed_fraction": 0.5,
    "follow_symlinks": False,
    "benchmark_images": 2000,
    "shards": 4,
    "cache_dir": "cache",
}


def test_the_defaults() -> None:
    """The defaults that users rely on."""
    assert DEFAULTS == {k: v for k, v in Settings().model_dump().items() if k in DEFAULTS}


def test_config_yaml_repeats_the_schema() -> None:
    """config.yaml has every setting with the default of the schema, and says what each does."""
    text = (REPOSITORY / "config.yaml").read_text()
    keys = re.findall(r"^(\w+):", text, re.M)

    assert Settings().model_dump() == yaml.safe_load(text)
    assert len(keys) == len(set(keys))
    assert [] == re.findall(r"^\w+:[^#]*$", text, re.M)


def requirements(names: list[str]) -> dict[str, str]:
    """Package to range, under PyPI's names in lower case."""
    conda = {"python-duckdb": "duckdb", "pytorch": "torch"}
    parsed = {name: n.removeprefix(name) for n in names for name in re.findall(r"^[\w.-]+", n)}
    lower = {name.lower().replace("_", "-"): span for name, span in parsed.items()}
    return {conda.get(name, name): span for name, span in lower.items()}


def test_conda_and_pip_agree() -> None:
    """environment.yml and pyproject.toml ask for the same packages in the same ranges."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in conda if isinstance(entry, dict))
    names = [entry for entry in conda if isinstance(entry, str)]
    found = requirements(names + pip)

    assert project["requires-python"] == found.pop("python")
    assert found.pop("pip") is not None
    assert requirements(project["dependencies"]) == found


def test_the_lock_is_within_the_ranges() -> None:
    """Every package of pyproject.toml has an exact version in the lock."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = requirements(project["dependencies"] + extras["demo"] + extras["test"])
    lock = (REPOSITORY / "requirements.lock").read_text().lower().replace("_", "-")
    locked = set(re.findall(r"^([\w.-]+)==", lock, re.M))

    assert [] == sorted(wanted.keys() - locked)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"topq": 5},
            "expected a known setting, found 'topq' (config.yaml); hint: did you mean topk?",
        ),
        (
            {"zzz": 5},
            "expected a known setting, found 'zzz' (config.yaml);"
            " hint: config.yaml lists every key",
        ),
        (
            {"topk": 0},
            "expected topk: greater than or equal to 1, found 0 (config.yaml);"
            " hint: topk is: images per listing, best score first (default 5)",
        ),
        (
            {"topk": 128},
            "expected topk: less than or equal to 127, found 128 (config.yaml);"
            " hint: topk is: images per listing, best score first (default 5)",
        ),
        (
            {"decode": "fast"},
            "expected decode: 'full' or 'scaled', found 'fast' (config.yaml);"
            " hint: decode is: full: every pixel; scaled: JPEG shrunk while decoding"
            " (default 'full')",
        ),
        (
            {"max_failed_fraction": 2},
            "expected max_failed_fraction: less than or equal to 1, found 2 (config.yaml);"
            " hint: max_failed_fraction is: stop before the load above this share of failed images"
            " (default 0.5)",
        ),
        (
            {"source": ""},
            "expected source: String should have at least 1 character, found '' (config.yaml);"
            " hint: source is: key: which recipe made the vectors"
            " (default 'listing_images_topk5_v1')",
        ),
    ],
)
def test_a_bad_setting_is_one_line(given: dict[str, Any], message: str) -> None:
    """What was expected, what was found, where, and what the setting means."""
    with pytest.raises(SettingsError) as error:
        Settings.check(given)

    assert message == str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"limit_listings": 0}, {"limit_listings": "many"}, {"topk": 1.5}, {"force": "perhaps"},
        {"device": "gpu"}, {"device": "cuda:x"}, {"precision": "fp8"}, {"shards": 0},
        {"batch_size": -1}, {"num_workers": 0}, {"max_failed_fraction": -0.1}, {"cache_dir": ""},
        {"model_name": ""}, {"benchmark_images": 0}, {"max_image_bytes": 0}, {"topk": None},
        {"lock_timeout_s": 0}, {"source": "two\nlines"},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(given: dict[str, Any]) -> None:
    """Each is refused by name, in one line."""
    with pytest.raises(SettingsError) as error:
        Settings.check(given)

    assert str(error.value).startswith(f"expected {next(iter(given))}: ")
    assert "\n" not in str(error.value)


def test_a_config_file_that_is_no_yaml_is_one_line(tmp_path: Path) -> None:
    """The parser's own words, on one line, with the file's name."""
    config = tmp_path / "config.yaml"
    config.write_text("topk: [1\nforce: {")

    with pytest.raises(SettingsError, match="expected YAML, found while parsing") as error:
        settings.read_config(path=config)
    assert "\n" not in str(error.value)
    assert str(config) in str(error.value)


def test_overrides_go_over_the_file(tmp_path: Path) -> None:
    """config.yaml, then KEY=VALUE; a number given for a text is that text."""
    config = tmp_path / "config.yaml"
    config.write_text("topk: 3\nsource: a\n")
    chosen = settings.read_config(["topk=4", "pca_rev=7", "force=true"], config)

    assert (4, "a", "7", True) == (chosen.topk, chosen.source, chosen.pca_rev, chosen.force)


def test_the_environment_has_defaults() -> None:
    """Without variables: the schemas, tables, image root and feature version of the design."""
    assert {
        "image_root": Path("listing_images"),
        "feature_version": 1,
        "listings": ("iPhone", "iphone_listings"),
        "images": ("iPhone", "iphone_image_assets"),
        "features": ("ml", "iphone_image_features_v1"),
        "vectors": ("ml", "img_vec512_v1"),
    } == Environment.read({}).model_dump()


def test_the_environment_names_everything() -> None:
    """Each variable has its own effect; an empty one is none."""
    names = {
        "IMAGE_ROOT_DIR": "/photos", "IMAGE_FEATURE_VERSION": "2", "LISTINGS_SCHEMA": "A",
        "LISTINGS_TABLE": "b", "ASSETS_SCHEMA": "C", "ASSETS_TABLE": "d", "ML_SCHEMA": "E",
        "IMAGE_FEATURES_TABLE": "f", "VECTORS_TABLE": "g",
    }  # fmt: skip

    assert {
        "image_root": Path("/photos"),
        "feature_version": 2,
        "listings": ("A", "b"),
        "images": ("C", "d"),
        "features": ("E", "f"),
        "vectors": ("E", "g"),
    } == Environment.read(names).model_dump()
    assert Environment.read({}) == Environment.read(dict.fromkeys(names, ""))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LISTINGS_TABLE", 'a"b'), ("LISTINGS_SCHEMA", "1a"), ("ASSETS_SCHEMA", "a.b"),
        ("ASSETS_TABLE", "a b"), ("ML_SCHEMA", "a;b"), ("VECTORS_TABLE", "x" * 64),
        ("IMAGE_FEATURES_TABLE", "ä"), ("IMAGE_FEATURE_VERSION", "one"),
        ("IMAGE_FEATURE_VERSION", "1.0"),
    ],
)  # fmt: skip
def test_a_bad_variable_is_one_line(name: str, value: str) -> None:
    """Its name, what was expected and what was found."""
    with pytest.raises(SettingsError) as error:
        Environment.read({name: value})

    assert str(error.value).startswith(f"expected {name}: ")
    assert f"found {value!r} (environment)" in str(error.value)


FLAGS = {
    "--limit-listings": 50000,
    "--topk": 5,
    "--model-name": "ViT-B-32",
    "--pretrained": "laion2b_s34b_b79k",
    "--source": "listing_images_topk5_v1",
    "--pca-rev": "",
    "--batch-size": 96,
    "--num-workers": 6,
    "--device": "auto",
    "--benchmark-images": 2000,
}
SWITCHES = [
    "--force", "--exclude-stock", "--include-stock", "--exclude-screenshots",
    "--include-screenshots", "--fp16", "--no-fp16", "--dry-run",
]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    run.add_flags(made)
    return made


def test_run_has_every_flag() -> None:
    """The flags of the script that the job replaces are all there, with its defaults in --help."""
    text = " ".join(parser().format_help().split())

    assert [] == [flag for flag in [*FLAGS, *SWITCHES] if flag not in text]
    for flag, default in FLAGS.items():
        assert f"(default: {default!r})" in text[text.index(f" {flag} ", text.index("options:")) :]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "all --cores all"),
        ("--topk 3 --limit-listings 10", "all --cores all --config limit_listings=10 topk=3"),
        ("--include-stock", "all --cores all --config exclude_stock=False"),
        (
            "--exclude-stock --include-screenshots",
            "all --cores all --config exclude_stock=True exclude_screenshots=False",
        ),
        ("--fp16", "all --cores all --config precision=fp16"),
        ("--no-fp16", "all --cores all --config precision=fp32"),
        ("--force", "all --cores all --config force=True --forcerun export"),
        ("--dry-run --cores 2", "vectors --cores 2"),
        ("--benchmark-images 5", "benchmark --cores all --config benchmark_images=5"),
        (
            "--model-name ViT-L-14 --pretrained openai --source s --pca-rev p --model-rev m",
            "all --cores all --config model_name=ViT-L-14 pretrained=openai source=s model_rev=m"
            " pca_rev=p",
        ),
        (
            "--batch-size 8 --num-workers 2 --device cpu",
            "all --cores all --config batch_size=8 num_workers=2 device=cpu",
        ),
        ("-- --set-scatter encode=64 -n", "all --cores all --set-scatter encode=64 -n"),
    ],
)
def test_run_prints_the_equal_command(
    given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each flag becomes its setting; what was not given is left to config.yaml."""
    monkeypatch.chdir(REPOSITORY)
    words = run.snakemake_command(parser().parse_args(given.split()))

    assert f"snakemake {expected}" == " ".join(words)


def test_run_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no Snakefile, this checkout's is named."""
    monkeypatch.chdir(tmp_path)
    words = run.snakemake_command(parser().parse_args([]))

    assert ["--snakefile", str(REPOSITORY / "Snakefile")] == words[-2:]


@pytest.mark.parametrize("given", ["--topk 0", "--device gpu", "--batch-size 0"])
def test_run_refuses_bad_values_at_once(given: str) -> None:
    """A bad flag is one line before anything is started."""
    with pytest.raises(SettingsError, match=f"expected {given.split()[0][2:].replace('-', '_')}: "):
        run.snakemake_command(parser().parse_args(given.split()))


def test_stages_get_the_settings_as_flags() -> None:
    """A stage's flags have the settings' names and defaults, and are checked like them."""
    made = argparse.ArgumentParser()
    settings.add_flags(made, "topk", "decode", "force")
    chosen = settings.from_flags(made.parse_args(["--topk=3", "--force=True"]))

    assert (3, "full", True) == (chosen.topk, chosen.decode, chosen.force)
    assert (5, "full", False) == tuple(
        getattr(settings.from_flags(made.parse_args([])), name)
        for name in ("topk", "decode", "force")
    )
    with pytest.raises(SettingsError, match="topk: greater than or equal to 1, found '0' .command"):
        settings.from_flags(made.parse_args(["--topk=0"]))


def test_every_setting_is_described() -> None:
    """The schema says of each setting what it does, in one line."""
    fields = Settings.model_fields

    assert [] == [name for name, field in fields.items() if not field.description]
    assert inspect.getdoc(Settings)
