WITH given AS (
    SELECT projection_name, "from", "to"
    FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS given (projection_name, "from", "to")
), free AS MATERIALIZED (
    SELECT projection_name, "to"
    FROM public.projection_checkpoints AS stored
    JOIN given USING (projection_name)
    WHERE stored."offset" = given."from" OR given."from" IS NULL
    FOR UPDATE OF stored SKIP LOCKED
)
UPDATE public.projection_checkpoints AS stored
SET "offset" = free."to", updated_at = clock_timestamp()
FROM free
WHERE stored.projection_name = free.projection_name
RETURNING stored.projection_name;
