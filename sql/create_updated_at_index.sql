CREATE INDEX ON public.projection_checkpoints (updated_at);
