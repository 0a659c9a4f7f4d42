SELECT "offset", pg_catalog.set_config('checkpoint_store.projection', $1, true)
FROM public.projection_checkpoints
WHERE projection_name OPERATOR(pg_catalog.=) $1
FOR UPDATE;
