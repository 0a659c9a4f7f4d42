UPDATE public.projection_checkpoints
SET "offset" = $3, updated_at = pg_catalog.clock_timestamp()
WHERE projection_name OPERATOR(pg_catalog.=) $1
  AND "offset" OPERATOR(pg_catalog.=) $2
RETURNING 1 OPERATOR(pg_catalog./) (
    projection_name OPERATOR(pg_catalog.=) $1
    AND "offset" OPERATOR(pg_catalog.=) $3
)::pg_catalog.int4 AS is_as_given;
