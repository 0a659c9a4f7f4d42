WITH saved AS (
    INSERT INTO public.projection_checkpoints (projection_name, "offset", updated_at)
    VALUES (pg_catalog.current_setting('checkpoint_store.projection'), 42, pg_catalog.clock_timestamp())
    RETURNING projection_name, "offset"
)
SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*)
FROM saved
WHERE projection_name OPERATOR(pg_catalog.=) pg_catalog.current_setting('checkpoint_store.projection')
  AND "offset" OPERATOR(pg_catalog.=) 42
  AND pg_catalog.current_setting('client_encoding') OPERATOR(pg_catalog.=) 'UTF8';
