INSERT INTO public.projection_checkpoints (projection_name, "offset", updated_at)
VALUES ($1, $2, pg_catalog.clock_timestamp());
