SELECT pg_catalog.quote_ident(nspname) || '.' || pg_catalog.quote_ident(relname)
FROM pg_catalog.pg_class
JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind IN ('r', 'p', 'v', 'm', 'f')
  AND pg_catalog.lower(nspname COLLATE pg_catalog."C") = pg_catalog.lower($1 COLLATE pg_catalog."C")
  AND pg_catalog.lower(relname COLLATE pg_catalog."C") = pg_catalog.lower($2 COLLATE pg_catalog."C")
  AND (nspname, relname) <> ($1, $2)
ORDER BY 1
LIMIT 1;
