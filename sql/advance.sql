UPDATE public.projection_checkpoints
SET "offset" = $3, updated_at = pg_catalog.clock_timestamp()
WHERE projection_name = $1 AND "offset" = $2;
