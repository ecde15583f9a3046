"""Self-contained HTML from templates that escape what they are given."""

from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("pipeline.pages", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(template: str, **values: Any) -> str:
    """The page of a template of this folder; texts among the values are escaped."""
    return _TEMPLATES.get_template(template).render(**values)
