-- The three inputs, for a trial. In production these are tables or views of the marketplace.
CREATE SCHEMA IF NOT EXISTS {listings_schema};
CREATE SCHEMA IF NOT EXISTS {images_schema};
CREATE SCHEMA IF NOT EXISTS {features_schema};
CREATE TABLE IF NOT EXISTS {listings} (
    generation  int    NOT NULL,
    listing_id  bigint NOT NULL,
    edited_date timestamptz,
    url         text,
    spam        text,
    PRIMARY KEY (generation, listing_id)
);
CREATE TABLE IF NOT EXISTS {images} (
    generation   int    NOT NULL,
    listing_id   bigint NOT NULL,
    image_index  int    NOT NULL,
    storage_path text,
    PRIMARY KEY (generation, listing_id, image_index)
);
CREATE TABLE IF NOT EXISTS {features} (
    feature_version        int    NOT NULL,
    generation             int    NOT NULL,
    listing_id             bigint NOT NULL,
    image_index            int    NOT NULL,
    is_stock_photo         bool,
    battery_screenshot     bool,
    photo_quality_level    smallint,
    background_clean_level smallint
);
CREATE INDEX IF NOT EXISTS {features_index}
    ON {features} (feature_version, generation, listing_id, image_index);
