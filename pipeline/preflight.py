"""Everything that can be wrong before the first image is read, checked in seconds."""

from collections.abc import Iterator
from pathlib import Path

from pipeline import database, source, target
from pipeline.errors import DataError
from pipeline.model import Model, find_model, resolve_device, resolve_precision
from pipeline.settings import Environment, Settings


def model_of(chosen: Settings) -> Model:
    """The configured model, its weights not loaded."""
    return find_model(chosen.model_name, chosen.pretrained, remember=Path(chosen.cache_dir))


def check_all(chosen: Settings, environment: Environment) -> Iterator[str]:
    """Yield a line for each thing that is right; raise a PipelineError for the first that isn't."""
    device = resolve_device(chosen.device)
    precision = resolve_precision(chosen.precision, device)
    yield f"settings: {device}, {precision}"
    model = model_of(chosen)
    with (
        database.connect(read_only=True, repeatable=True) as connection,
        connection.cursor() as cursor,
    ):
        yield "database: PG_DSN answers"
        source.check_inputs(cursor, environment)
        yield f"inputs: {', '.join(_inputs(environment))}"
        target.check(cursor, environment, model.embed_dim)
        yield f"target: {database.quoted(environment.vectors)}"
    check_image_root(environment.image_root)
    yield f"images: {environment.image_root}"
    from pipeline.encoder import weights_present  # loads torch, so only after the quick checks

    weights_present(model)
    yield f"model: {chosen.model_rev or model.model_rev}, {model.embed_dim}-d, weights present"


def _inputs(environment: Environment) -> list[str]:
    return [database.quoted(getattr(environment, n)) for n in ("listings", "images", "features")]


def check_image_root(root: Path) -> None:
    """The image root is a folder that can be read; else DataError."""
    if not root.is_dir():
        raise DataError(
            "a folder of images at IMAGE_ROOT_DIR",
            "none" if not root.exists() else "no folder",
            str(root),
            "export IMAGE_ROOT_DIR=/path/to/images",
        )
