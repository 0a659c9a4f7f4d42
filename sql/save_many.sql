INSERT INTO public.projection_checkpoints (projection_name, "offset", updated_at)
SELECT projection_name, "offset", pg_catalog.clock_timestamp()
FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS given (projection_name, "offset")
ORDER BY projection_name COLLATE "C"
ON CONFLICT (projection_name)
DO UPDATE SET "offset" = EXCLUDED."offset", updated_at = pg_catalog.clock_timestamp();
