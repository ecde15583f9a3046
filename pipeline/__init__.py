"""One image vector per marketplace listing: Postgres to pgvector, through Parquet."""
