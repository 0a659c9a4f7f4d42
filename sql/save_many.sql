WITH given AS MATERIALIZED (
    SELECT projection_name, "offset"
    FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS given (projection_name, "offset")
), written AS (
    INSERT INTO public.projection_checkpoints (projection_name, "offset", updated_at)
    SELECT projection_name, "offset", pg_catalog.clock_timestamp()
    FROM given
    ORDER BY projection_name COLLATE pg_catalog."C"
    ON CONFLICT (projection_name)
    DO UPDATE SET "offset" = EXCLUDED."offset", updated_at = pg_catalog.clock_timestamp()
    RETURNING projection_name, "offset"
)
SELECT 1 OPERATOR(pg_catalog./) (
    pg_catalog.count(*) OPERATOR(pg_catalog.=) pg_catalog.cardinality($1)
)::pg_catalog.int4 AS is_as_given
FROM written
JOIN given
  ON given.projection_name OPERATOR(pg_catalog.=) written.projection_name
 AND given."offset" OPERATOR(pg_catalog.=) written."offset";
