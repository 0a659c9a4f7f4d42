SELECT projection_name, "offset", updated_at
FROM public.projection_checkpoints
WHERE projection_name OPERATOR(pg_catalog.=) $1;
