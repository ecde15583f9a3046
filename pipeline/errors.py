"""The errors that a user can mend. Each prints as one line: expected, found, where, hint."""


class PipelineError(Exception):
    """Something that the user can mend; shown as one line, never with a traceback."""

    def __init__(self, expected: str, found: str, where: str = "", hint: str = "") -> None:
        line = f"expected {expected}, found {found}"
        if where:
            line += f" ({where})"
        if hint:
            line += f"; hint: {hint}"
        super().__init__(" ".join(line.split()))


class SettingsError(PipelineError):
    """A key of config.yaml, an environment variable or a flag has a bad value."""


class DatabaseError(PipelineError):
    """The database, one of its tables or a privilege is not as the job needs it."""


class DatabaseUnreachable(DatabaseError):
    """Nothing answers at PG_DSN; the same call may succeed later."""


class ModelError(PipelineError):
    """The model, its weights or its dimension is not as the job needs it."""


class DataError(PipelineError):
    """An intermediate file does not hold what its stage promises."""


class TooManyFailures(PipelineError):
    """More than max_failed_fraction of the images failed, so nothing was loaded."""


class MixedModels(PipelineError):
    """The table already holds vectors of other weights under this key."""
