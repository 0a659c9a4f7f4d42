WITH given AS (
    SELECT projection_name, "from", "to"
    FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) AS given (projection_name, "from", "to")
), free AS MATERIALIZED (
    SELECT projection_name, "to"
    FROM public.projection_checkpoints AS stored
    JOIN given USING (projection_name)
    WHERE stored."offset" = given."from" OR given."from" IS NULL
    FOR UPDATE OF stored SKIP LOCKED
)
UPDATE public.projection_checkpoints AS stored
SET "offset" = free."to", updated_at = pg_catalog.clock_timestamp()
FROM free
WHERE stored.projection_name = free.projection_name
RETURNING stored.projection_name;
