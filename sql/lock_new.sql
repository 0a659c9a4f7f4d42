INSERT INTO public.projection_checkpoints AS stored (projection_name, "offset", updated_at)
SELECT $1, 0, pg_catalog.clock_timestamp()
FROM pg_catalog.pg_advisory_xact_lock(
    pg_catalog.hashtextextended($1, pg_catalog.hashtext($2))
)
ON CONFLICT (projection_name) DO UPDATE SET "offset" = stored."offset"
RETURNING stored."offset" OPERATOR(pg_catalog./) (
    stored.projection_name OPERATOR(pg_catalog.=) $1
)::pg_catalog.int4 AS "offset";
