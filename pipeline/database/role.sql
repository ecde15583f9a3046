-- The role that runs the job: it reads the three inputs, writes the target, and nothing else.
-- Run this as the owner of the tables, after create-table; then, in psql: \password "{role}"
CREATE ROLE "{role}" LOGIN;
DO $$ BEGIN
    EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO "{role}"', current_database());
END $$;
GRANT USAGE ON SCHEMA {schemas} TO "{role}";
-- Without a features table, leave its name out.
GRANT SELECT ON {listings}, {images}, {features} TO "{role}";
-- The second is the registry of encoders, which keeps two models from sharing a key.
GRANT SELECT, INSERT, UPDATE ON {vectors}, {registry} TO "{role}";
-- For a search; the function of earlier moments needs no more than the target.
GRANT SELECT ON {current} TO "{role}";
