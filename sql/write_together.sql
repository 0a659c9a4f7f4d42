WITH given AS (
    SELECT projection_name, "from", "to"
    FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) AS given (projection_name, "from", "to")
), free AS MATERIALIZED (
    SELECT stored.projection_name, given."to"
    FROM public.projection_checkpoints AS stored
    JOIN given ON given.projection_name OPERATOR(pg_catalog.=) stored.projection_name
    WHERE stored."offset" OPERATOR(pg_catalog.=) given."from" OR given."from" IS NULL
    FOR UPDATE OF stored SKIP LOCKED
)
UPDATE public.projection_checkpoints AS stored
SET "offset" = free."to", updated_at = pg_catalog.clock_timestamp()
FROM free
WHERE stored.projection_name OPERATOR(pg_catalog.=) free.projection_name
RETURNING free.projection_name, 1 OPERATOR(pg_catalog./) (
    stored.projection_name OPERATOR(pg_catalog.=) free.projection_name
    AND stored."offset" OPERATOR(pg_catalog.=) free."to"
)::pg_catalog.int4 AS is_as_given;
