WITH found AS MATERIALIZED (
    SELECT "offset"
    FROM public.projection_checkpoints
    WHERE projection_name OPERATOR(pg_catalog.=) $1
    FOR UPDATE
), moved AS (
    INSERT INTO public.projection_checkpoints AS stored (projection_name, "offset", updated_at)
    SELECT $1, $3, pg_catalog.clock_timestamp()
    WHERE COALESCE((SELECT "offset" FROM found), 0) OPERATOR(pg_catalog.=) $2
    ON CONFLICT (projection_name)
    DO UPDATE SET "offset" = EXCLUDED."offset", updated_at = pg_catalog.clock_timestamp()
    WHERE stored."offset" OPERATOR(pg_catalog.=) $2
    RETURNING 1 OPERATOR(pg_catalog./) (
        stored.projection_name OPERATOR(pg_catalog.=) $1
        AND stored."offset" OPERATOR(pg_catalog.=) $3
    )::pg_catalog.int4 AS is_as_given
)
SELECT EXISTS (SELECT FROM moved WHERE is_as_given OPERATOR(pg_catalog.=) 1) AS moved,
       (SELECT "offset" FROM found) AS found;
