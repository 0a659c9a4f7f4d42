CREATE TABLE IF NOT EXISTS public.projection_checkpoints (
    projection_name text PRIMARY KEY,
    "offset" bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 25);
