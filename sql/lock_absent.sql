SELECT pg_catalog.row_security_active($2) AS may_hide, true AS is_locked,
       CURRENT_TIMESTAMP AS began
FROM pg_catalog.pg_advisory_xact_lock(
    pg_catalog.hashtextextended($1, pg_catalog.hashtext($2))
);
