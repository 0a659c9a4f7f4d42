SELECT projection_name, "offset", updated_at, pg_catalog.row_security_active(tableoid) AS may_hide
FROM public.projection_checkpoints;
