INSERT INTO public.projection_checkpoints AS stored (projection_name, "offset", updated_at)
VALUES ($1, $2, pg_catalog.clock_timestamp())
ON CONFLICT (projection_name)
DO UPDATE SET "offset" = EXCLUDED."offset", updated_at = pg_catalog.clock_timestamp()
RETURNING 1 OPERATOR(pg_catalog./) (
    stored.projection_name OPERATOR(pg_catalog.=) $1
    AND stored."offset" OPERATOR(pg_catalog.=) $2
)::pg_catalog.int4 AS is_as_given;
