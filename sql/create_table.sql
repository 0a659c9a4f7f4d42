CREATE TABLE IF NOT EXISTS public.projection_checkpoints (
    projection_name pg_catalog.text COLLATE pg_catalog."C" PRIMARY KEY,
    "offset" pg_catalog.int8 NOT NULL,
    updated_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.now()
) WITH (fillfactor = 25);
