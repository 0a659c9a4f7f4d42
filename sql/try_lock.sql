SELECT "offset"
FROM public.projection_checkpoints
WHERE projection_name = $1
FOR UPDATE SKIP LOCKED;
