SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*)
FROM public.projection_checkpoints
WHERE projection_name OPERATOR(pg_catalog.=) $1
  AND "offset" OPERATOR(pg_catalog.=) $2;
