"""Settings: one set of names and defaults everywhere, and one line for what is wrong."""

import argparse
import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from pipeline.stage import settings
from pipeline.stage.errors import SettingsError
from pipeline.stage.settings import Environment, Identity, Settings
from pipeline.workflow import run

DEFAULTS: dict[str, Any] = {
    "limit_listings": 50000,
    "topk": 5,
    "force": False,
    "exclude_stock": True,
    "exclude_screenshots": True,
    "model_name": "ViT-B-32",
    "pretrained": "laion2b_s34b_b79k",
    "source": "",
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
    "shards": "auto",
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "listing_images_topk5_v1"),
        ({"topk": 3}, "listing_images_topk3_v1"),
        ({"topk": 3, "source": "mine"}, "mine"),
        ({"exclude_stock": False}, "listing_images_topk5_v1"),
    ],
)
def test_an_empty_source_follows_topk(given: dict[str, Any], expected: str) -> None:
    """Another topk is another key unless the source has a name of its own."""
    assert expected == Settings(**given).identity.source


def test_the_recipe_is_what_makes_a_listing_of_its_images() -> None:
    """It has each setting that decides which images count, and the projection."""
    chosen = Settings(topk=3, exclude_stock=False, exclude_screenshots=False)

    assert {
        "topk": 3, "exclude_stock": False, "exclude_screenshots": False, "projection": "",
    } == chosen.recipe  # fmt: skip
    assert {
        "topk": 5, "exclude_stock": True, "exclude_screenshots": True, "projection": "",
    } == Settings().recipe  # fmt: skip


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
            {"shards": "many"},
            "expected shards: a valid integer, unable to parse string as an integer or 'auto',"
            " found 'many' (config.yaml); hint: shards is: parts that can be encoded side by side;"
            " auto: one for 10,000 photos (default 'auto')",
        ),
        (
            {"decode": "fast"},
            "expected decode: 'full', 'scaled' or 'gpu', found 'fast' (config.yaml);"
            " hint: decode is: full: every pixel; scaled: JPEG shrunk while decoding; gpu: on the"
            " GPU (default 'full')",
        ),
        (
            {"max_failed_fraction": 2},
            "expected max_failed_fraction: less than or equal to 1, found 2 (config.yaml);"
            " hint: max_failed_fraction is: a run stops for a wrong IMAGE_ROOT_DIR if a larger"
            " share of the newest listings with a vector has no photo left, or no photo of the run"
            " is there; 1: never"
            " (default 0.5)",
        ),
        (
            {"model_name": ""},
            "expected model_name: String should have at least 1 character, found '' (config.yaml);"
            " hint: model_name is: open_clip model, or local-dir:FOLDER (default 'ViT-B-32')",
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


HOW = (
    "as in 'topk: 5', with a blank after the colon; without this file, the settings are those of"
    " the config.yaml beside the Snakefile"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "topk: 3\nforce {\n",
            "YAML, found could not find expected ':' ({config}, line 3); hint: a setting is KEY:"
            " VALUE, with a blank after the colon and without tabs",
        ),
        (
            "topk: [1\nforce: {",
            "YAML, found expected ',' or ']', but got ':' ({config}, line 2); hint: a setting is"
            " KEY: VALUE, with a blank after the colon and without tabs",
        ),
        ("", f"settings as KEY: VALUE, one a line, found nothing ({{config}}); hint: {HOW}"),
        (
            "- topk: 3\n",
            f"settings as KEY: VALUE, one a line, found a list ({{config}}); hint: {HOW}",
        ),
        (
            "topk:3\n",
            "settings as KEY: VALUE, one a line, found the text 'topk:3' ({config}); hint: " + HOW,
        ),
    ],
    ids=["colon", "bracket", "empty", "list", "blank"],
)
def test_a_config_file_that_is_no_mapping_is_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    """What is wrong with it, on which line of which file, and how a setting looks."""
    config = tmp_path / "config.yaml"
    config.write_text(text)

    with pytest.raises(SettingsError) as error:
        settings.read_config(path=config)
    assert f"expected {message.format(config=config)}" == str(error.value)


def test_whose_fault_a_bad_setting_is(tmp_path: Path) -> None:
    """A setting of the file is laid to the file, one of --config to --config."""
    config = tmp_path / "config.yaml"
    config.write_text("topk: 3\n")
    (tmp_path / "bad.yaml").write_text("topk: 0\n")

    with pytest.raises(SettingsError, match=r"found 0 \(--config\)"):
        settings.read_config(["topk=0"], config)
    with pytest.raises(SettingsError, match=rf"found 0 \({tmp_path / 'bad.yaml'}\)"):
        settings.read_config(["decode=full"], tmp_path / "bad.yaml")
    with pytest.raises(SettingsError, match=r"expected KEY=VALUE, found 'topk' \(--config\)"):
        settings.read_config(["topk"], config)


def test_the_settings_beside_the_snakefile_are_used_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder without config.yaml the checkout's counts, and a line says so; else it does not.

    The results go to the folder itself, and the line says that too.
    """
    checkout, folder = tmp_path / "checkout", tmp_path / "folder"
    checkout.mkdir()
    folder.mkdir()
    (checkout / "config.yaml").write_text("topk: 3\n")
    monkeypatch.setattr(settings, "CHECKOUT", checkout)
    monkeypatch.chdir(folder)
    beside = settings.read_config()
    said = capsys.readouterr().err
    (folder / "config.yaml").write_text("topk: 4\n")
    own = settings.read_config()

    assert (3, 4) == (beside.topk, own.topk)
    assert (
        f"no config.yaml in this folder: settings are {checkout}/config.yaml,"
        f" results go to {folder}/results\n"
    ) == said
    assert "" == capsys.readouterr().err


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
        "features_named": False,
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
        "features_named": True,
        "vectors": ("E", "g"),
    } == Environment.read(names).model_dump()
    assert Environment.read({}) == Environment.read(dict.fromkeys(names, ""))


@pytest.mark.parametrize("length", [1, 54, 55, 63])
def test_the_registry_has_a_name_that_postgres_takes_whole(length: int) -> None:
    """It stands beside the vectors under their name; 63 letters are the most of any name."""
    registry = Environment.read({"ML_SCHEMA": "m", "VECTORS_TABLE": "v" * length}).registry

    assert ("m", "v" * min(length, 54) + "_encoders") == registry
    assert 63 >= len(registry[1])


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
    "--source": "",
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


def named_at(rule: str) -> set[str]:
    """The settings that a rule of the Snakefile names, in its params and resources."""
    text = (REPOSITORY / "Snakefile").read_text()
    block = re.findall(rf"^rule {rule}:\n(.*?)(?=^rule |\Z)", text, re.M | re.S)[0]
    params = block.split("    params:\n")[1].split("        code=")[0]
    groups = {"*KEY": Identity._fields, "*PHOTO_LIMITS": settings.PHOTO_LIMITS}
    listed = [name for group, names in groups.items() if group in params for name in names]
    return {
        *listed,
        *re.findall(r'"(\w+)"', params),
        *re.findall(r"\b(?:settings|each)\.(\w+)", block),
    }


@pytest.mark.parametrize(
    "stage", ["export", "select", "encode", "aggregate", "load", "benchmark", "evaluate", "index"]
)
def test_a_rule_names_the_settings_of_its_command(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each setting that a stage takes as a flag is named at its rule, and no other."""
    monkeypatch.setattr("sys.argv", [stage, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"pipeline.{stage}").main()
    text = capsys.readouterr().out
    flags = {f.replace("-", "_") for f in re.findall(r"^  --([\w-]+)", text, re.M)}
    module = importlib.import_module(f"pipeline.{stage}")

    chosen_by_the_plan = {"weights", "projection", "threads", "shards"}
    assert named_at(stage) - chosen_by_the_plan == (
        flags & Settings.model_fields.keys() - chosen_by_the_plan
    )
    assert str(module.__doc__).splitlines()[0] in " ".join(text.split())
