-- The pgvector table that the load writes: one row per listing, edit and encoder.
-- IF NOT EXISTS would ask for the right to create schemas even where this one is there.
DO $$ BEGIN IF to_regnamespace('{schema}') IS NULL THEN CREATE SCHEMA {schema}; END IF; END $$;
CREATE TABLE IF NOT EXISTS {vectors} (
    listing_id  bigint      NOT NULL,
    edited_date timestamptz NOT NULL,
    source      text        NOT NULL,
    model_rev   text        NOT NULL,
    pca_rev     text        NOT NULL DEFAULT '',
    vec         {kind} NOT NULL,
    n_images    int         NOT NULL,
    updated_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (listing_id, edited_date, source, model_rev, pca_rev)
);
-- A 512-d vector is 2056 bytes, just over the TOAST threshold; PLAIN keeps it in its row.
ALTER TABLE {vectors} ALTER COLUMN vec SET STORAGE {storage};
