-- What made the vectors of each key: two encoders or recipes must never share one.
CREATE TABLE IF NOT EXISTS {registry} (
    source     text        NOT NULL,
    model_rev  text        NOT NULL,
    pca_rev    text        NOT NULL,
    encoder    jsonb       NOT NULL, -- weights, architecture, transform; the rest: of the last load
    recipe     jsonb,                -- topk, exclusions, projection; null: not known
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, model_rev, pca_rev)
);
-- One that was made before recipes were kept.
ALTER TABLE {registry} ADD COLUMN IF NOT EXISTS recipe jsonb;
