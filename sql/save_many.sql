INSERT INTO public.projection_checkpoints (projection_name, "offset", updated_at)
SELECT projection_name, "offset", clock_timestamp()
FROM unnest($1::text[], $2::bigint[]) AS given (projection_name, "offset")
ORDER BY projection_name COLLATE "C"
ON CONFLICT (projection_name)
DO UPDATE SET "offset" = EXCLUDED."offset", updated_at = clock_timestamp();
