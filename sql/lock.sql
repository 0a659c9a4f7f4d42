SELECT "offset", pg_catalog.date_part('epoch', pg_catalog.transaction_timestamp()) AS began
FROM public.projection_checkpoints
WHERE projection_name OPERATOR(pg_catalog.=) $1
FOR UPDATE;
