WITH held AS MATERIALIZED (
    SELECT "offset"
    FROM public.projection_checkpoints
    WHERE projection_name = $1
    FOR UPDATE SKIP LOCKED
)
SELECT (SELECT "offset" FROM held) AS held,
       EXISTS (SELECT FROM public.projection_checkpoints WHERE projection_name = $1) AS present;
