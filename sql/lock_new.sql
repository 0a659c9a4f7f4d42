INSERT INTO public.projection_checkpoints AS stored (projection_name, "offset", updated_at)
VALUES ($1, 0, pg_catalog.clock_timestamp())
ON CONFLICT (projection_name) DO UPDATE SET "offset" = stored."offset"
RETURNING "offset";
