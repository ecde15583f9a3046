-- Views over the files of a run: duckdb -init results.sql, in the folder where it ran.
-- docs/questions.md has what to ask them.
CREATE OR REPLACE VIEW listings AS SELECT * FROM 'results/export/listings.parquet';
CREATE OR REPLACE VIEW images AS SELECT * FROM 'results/export/images.parquet';
CREATE OR REPLACE VIEW selected AS SELECT * FROM 'results/select/*-of-*.parquet';
CREATE OR REPLACE VIEW encoded AS SELECT * FROM 'results/encode/*-of-*.parquet';
CREATE OR REPLACE VIEW failures AS SELECT * EXCLUDE (vec) FROM encoded WHERE error IS NOT NULL;
CREATE OR REPLACE VIEW vectors AS SELECT * FROM 'results/aggregate/listing_vectors.parquet';
CREATE OR REPLACE VIEW without_vector AS SELECT * FROM 'results/aggregate/without_vector.parquet';
CREATE OR REPLACE VIEW receipt AS SELECT * FROM read_json('results/load/receipt.json');
