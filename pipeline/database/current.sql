-- For those who ask. Functions, since a view over the tables would forbid to alter or drop them, and
-- since the planner sees through them: a filter on the key and an index on vec reach the table.
-- As it was at a moment: of each listing and key the newest edit until then that has a vector.
CREATE OR REPLACE FUNCTION {as_of}(moment timestamptz)
RETURNS TABLE (listing_id bigint, edited_date timestamptz, source text, model_rev text, pca_rev text,
               vec vector, n_images int, updated_at timestamptz)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
SELECT v.listing_id, v.edited_date, v.source, v.model_rev, v.pca_rev, v.vec, v.n_images, v.updated_at
FROM {vectors} v
WHERE v.edited_date <= moment
  AND NOT EXISTS (
    SELECT FROM {vectors} n
    WHERE n.listing_id = v.listing_id AND n.source = v.source AND n.model_rev = v.model_rev
      AND n.pca_rev = v.pca_rev AND n.edited_date > v.edited_date AND n.edited_date <= moment)
$$;
-- As it is: none of a listing that is deleted, or spam by now.
CREATE OR REPLACE FUNCTION {current}()
RETURNS TABLE (listing_id bigint, edited_date timestamptz, source text, model_rev text, pca_rev text,
               vec vector, n_images int, updated_at timestamptz)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
SELECT v.* FROM {as_of}('infinity') v
WHERE EXISTS (SELECT FROM {listings} l WHERE l.listing_id = v.listing_id AND l.spam IS NULL)
$$;
CREATE OR REPLACE VIEW {current} AS SELECT * FROM {current}();
