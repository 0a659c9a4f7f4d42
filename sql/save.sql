INSERT INTO public.projection_checkpoints (projection_name, "offset", updated_at)
VALUES ($1, $2, clock_timestamp())
ON CONFLICT (projection_name)
DO UPDATE SET "offset" = EXCLUDED."offset", updated_at = clock_timestamp();
