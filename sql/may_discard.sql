SELECT relhastriggers OR relhasrules OR relrowsecurity AS may_discard
FROM pg_catalog.pg_class
WHERE oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass($1);
