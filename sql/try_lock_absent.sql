SELECT pg_catalog.row_security_active($2) AS may_hide, is_locked AND NOT EXISTS (
    SELECT
    FROM public.projection_checkpoints
    WHERE projection_name OPERATOR(pg_catalog.=) $1
) AS is_locked, CURRENT_TIMESTAMP AS began
FROM pg_catalog.pg_try_advisory_xact_lock(
    pg_catalog.hashtextextended($1, pg_catalog.hashtext($2))
) AS is_locked;
