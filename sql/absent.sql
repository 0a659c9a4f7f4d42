SELECT pg_catalog.row_security_active($1) AS may_hide, EXISTS (
    SELECT
    FROM public.projection_checkpoints
    WHERE projection_name OPERATOR(pg_catalog.=) $2
) AS is_there;
