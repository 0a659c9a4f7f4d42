WITH saved AS (
    UPDATE public.projection_checkpoints
    SET "offset" = 42, updated_at = pg_catalog.clock_timestamp()
    WHERE projection_name OPERATOR(pg_catalog.=) pg_catalog.current_setting('checkpoint_store.projection')
    RETURNING projection_name, "offset"
)
SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*)
FROM saved
WHERE projection_name OPERATOR(pg_catalog.=) pg_catalog.current_setting('checkpoint_store.projection')
  AND "offset" OPERATOR(pg_catalog.=) 42
  AND pg_catalog.current_setting('client_encoding') OPERATOR(pg_catalog.=) 'UTF8';
