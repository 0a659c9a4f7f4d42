UPDATE public.projection_checkpoints
SET "offset" = $2, updated_at = pg_catalog.clock_timestamp()
WHERE projection_name OPERATOR(pg_catalog.=) $1
  AND pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL;
