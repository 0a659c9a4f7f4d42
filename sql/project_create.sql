INSERT INTO public.projection_checkpoints (projection_name, "offset", updated_at)
SELECT $1, $2, pg_catalog.clock_timestamp()
WHERE pg_catalog.date_part('epoch', pg_catalog.transaction_timestamp())
      OPERATOR(pg_catalog.=) $3::pg_catalog.float8;
