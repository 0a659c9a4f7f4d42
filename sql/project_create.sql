INSERT INTO public.projection_checkpoints (projection_name, "offset", updated_at)
SELECT $1, $2, pg_catalog.clock_timestamp()
WHERE pg_catalog.current_setting('checkpoint_store.is_locked', true) OPERATOR(pg_catalog.=) 'yes';
