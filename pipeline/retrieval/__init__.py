"""Do the halves of a listing's photos find each other? Numpy, DuckDB and Parquet, nothing else."""
