"""The key of a row in the target, and which rows are of the key that a transaction has bound."""

from pipeline.database.connection import quoted
from pipeline.stage.settings import Environment, Identity

KEY = ("listing_id", "edited_date", *Identity._fields)

# A row `v` of the target is of the key that `bind` made readable.
OF_KEY = " AND ".join(
    f"v.{name} = current_setting('listing_vectors.{name}')" for name in Identity._fields
)

# The same for a join with the whole table. Postgres multiplies how rare each of the three is: of a
# table that it has not analysed since the first load, or of a new key, it expects a row or none,
# and compares each with each. Of a CASE it expects half. What was bound is looked up once, not for
# each row.
_OF_KEY_ONCE = " AND ".join(
    f"v.{name} = (SELECT current_setting('listing_vectors.{name}'))" for name in Identity._fields
)
HALF_OF_KEY = f"CASE WHEN {_OF_KEY_ONCE} THEN true END"


def rest_sql(environment: Environment, replaced: str) -> str:
    """How many rows of the bound key have no counterpart in the relation `replaced`."""
    return (
        f"SELECT count(*) FROM {quoted(environment.vectors)} v"
        f" WHERE {HALF_OF_KEY} AND NOT EXISTS (SELECT FROM {replaced} r"
        " WHERE r.listing_id = v.listing_id AND r.edited_date = v.edited_date)"
    )
