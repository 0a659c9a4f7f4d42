WITH found AS MATERIALIZED (
    SELECT "offset"
    FROM public.projection_checkpoints
    WHERE projection_name = $1
    FOR UPDATE
), created AS (
    INSERT INTO public.projection_checkpoints AS stored (projection_name, "offset", updated_at)
    SELECT $1, 0, clock_timestamp()
    WHERE NOT EXISTS (SELECT FROM found)
    ON CONFLICT (projection_name) DO UPDATE SET "offset" = stored."offset"
    RETURNING stored."offset"
)
SELECT "offset" FROM found
UNION ALL
SELECT "offset" FROM created;
