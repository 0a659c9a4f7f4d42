UPDATE public.projection_checkpoints
SET "offset" = $2, updated_at = pg_catalog.clock_timestamp()
WHERE projection_name OPERATOR(pg_catalog.=) $1
  AND pg_catalog.date_part('epoch', pg_catalog.transaction_timestamp())
      OPERATOR(pg_catalog.=) $3::pg_catalog.float8;
