WITH found AS MATERIALIZED (
    SELECT "offset"
    FROM public.projection_checkpoints
    WHERE projection_name = $1
    FOR UPDATE
), moved AS (
    INSERT INTO public.projection_checkpoints AS stored (projection_name, "offset", updated_at)
    SELECT $1, $3, pg_catalog.clock_timestamp()
    WHERE COALESCE((SELECT "offset" FROM found), 0) = $2
    ON CONFLICT (projection_name)
    DO UPDATE SET "offset" = EXCLUDED."offset", updated_at = pg_catalog.clock_timestamp()
    WHERE stored."offset" = $2
    RETURNING "offset"
)
SELECT EXISTS (SELECT FROM moved) AS moved, (SELECT "offset" FROM found) AS found;
