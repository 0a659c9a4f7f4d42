INSERT INTO public.projection_checkpoints (projection_name, "offset", updated_at)
SELECT $1, $2, pg_catalog.clock_timestamp()
WHERE CURRENT_TIMESTAMP OPERATOR(pg_catalog.=) $3;
