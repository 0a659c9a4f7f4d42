SELECT "offset", CURRENT_TIMESTAMP AS began
FROM public.projection_checkpoints
WHERE projection_name OPERATOR(pg_catalog.=) $1
FOR UPDATE;
