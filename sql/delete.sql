DELETE FROM public.projection_checkpoints
WHERE projection_name OPERATOR(pg_catalog.=) $1
RETURNING projection_name;
