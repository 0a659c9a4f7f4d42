WITH given AS MATERIALIZED (
    SELECT projection_name, "offset"
    FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS given (projection_name, "offset")
), held AS MATERIALIZED (
    SELECT stored.projection_name, stored."offset" AS found, given."offset" AS wanted, stored.updated_at
    FROM public.projection_checkpoints AS stored
    JOIN given ON given.projection_name OPERATOR(pg_catalog.=) stored.projection_name
    ORDER BY stored.projection_name COLLATE pg_catalog."C"
    FOR UPDATE OF stored
), written AS (
    UPDATE public.projection_checkpoints AS stored
    SET "offset" = held.wanted, updated_at = pg_catalog.clock_timestamp()
    FROM held
    WHERE stored.projection_name OPERATOR(pg_catalog.=) held.projection_name
      AND (
          SELECT pg_catalog.count(*)
          FROM held
          WHERE updated_at OPERATOR(pg_catalog.<) $3
      ) OPERATOR(pg_catalog.=) pg_catalog.cardinality($1)
    RETURNING 1 OPERATOR(pg_catalog./) (
        stored.projection_name OPERATOR(pg_catalog.=) held.projection_name
        AND stored."offset" OPERATOR(pg_catalog.=) held.wanted
    )::pg_catalog.int4 AS is_as_given
)
SELECT (
    SELECT pg_catalog.count(*) FROM written
) OPERATOR(pg_catalog.=) pg_catalog.cardinality($1) AS is_written, (
    SELECT pg_catalog.count(*)
    FROM held
    WHERE found OPERATOR(pg_catalog.=) wanted
) OPERATOR(pg_catalog.=) pg_catalog.cardinality($1) AS is_as_given;
