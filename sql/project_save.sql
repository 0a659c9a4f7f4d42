UPDATE public.projection_checkpoints
SET "offset" = $2, updated_at = pg_catalog.clock_timestamp()
WHERE projection_name OPERATOR(pg_catalog.=) $1
  AND CURRENT_TIMESTAMP OPERATOR(pg_catalog.=) $3;
