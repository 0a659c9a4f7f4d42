SELECT pg_catalog.format('%I.%I', nspname, relname)
FROM pg_catalog.pg_class
JOIN pg_catalog.pg_namespace ON pg_namespace.oid OPERATOR(pg_catalog.=) relnamespace
WHERE relkind OPERATOR(pg_catalog.=) ANY (ARRAY['r', 'p', 'v', 'm', 'f']::pg_catalog."char"[])
  AND pg_catalog.lower(nspname COLLATE pg_catalog."C")
      OPERATOR(pg_catalog.=) pg_catalog.lower($1 COLLATE pg_catalog."C")
  AND pg_catalog.lower(relname COLLATE pg_catalog."C")
      OPERATOR(pg_catalog.=) pg_catalog.lower($2 COLLATE pg_catalog."C")
  AND NOT (nspname OPERATOR(pg_catalog.=) $1 AND relname OPERATOR(pg_catalog.=) $2)
ORDER BY 1
LIMIT 1;
