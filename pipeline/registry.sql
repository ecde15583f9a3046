-- Which encoder made the vectors under each key: two models must never share one.
CREATE TABLE IF NOT EXISTS {registry} (
    source     text        NOT NULL,
    model_rev  text        NOT NULL,
    pca_rev    text        NOT NULL,
    encoder    jsonb       NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, model_rev, pca_rev)
);
