WITH deleted AS (
    DELETE FROM public.projection_checkpoints
    WHERE projection_name OPERATOR(pg_catalog.=) $1
      AND updated_at OPERATOR(pg_catalog.<) $2
    RETURNING projection_name
)
SELECT EXISTS (SELECT FROM deleted) AS is_deleted, EXISTS (
    SELECT
    FROM public.projection_checkpoints
    WHERE projection_name OPERATOR(pg_catalog.=) $1
) AS was_there;
