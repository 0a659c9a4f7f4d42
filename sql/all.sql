SELECT projection_name, "offset", updated_at
FROM public.projection_checkpoints
ORDER BY projection_name COLLATE "C";
