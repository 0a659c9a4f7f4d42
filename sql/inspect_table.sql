SELECT class.relkind::pg_catalog.text AS kind,
       class.relpersistence::pg_catalog.text AS persistence,
       pg_catalog.row_security_active(class.oid) AS may_hide,
       EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE pg_inherits.inhparent OPERATOR(pg_catalog.=) class.oid) AS has_heirs,
       attribute.attname::pg_catalog.text AS column_name,
       attribute.atttypid OPERATOR(pg_catalog.=) CASE
           WHEN attribute.attname OPERATOR(pg_catalog.=) 'projection_name'
           THEN 'pg_catalog.text'::pg_catalog.regtype
           WHEN attribute.attname OPERATOR(pg_catalog.=) 'offset'
           THEN 'pg_catalog.int8'::pg_catalog.regtype
           WHEN attribute.attname OPERATOR(pg_catalog.=) 'updated_at'
           THEN 'pg_catalog.timestamptz'::pg_catalog.regtype
       END::pg_catalog.oid AS has_expected_type,
       pg_catalog.format_type(attribute.atttypid, attribute.atttypmod) AS type_name,
       attribute.attnotnull AS not_null,
       attribute.attnotnull AND NOT EXISTS (
           SELECT
           FROM pg_catalog.pg_constraint
           WHERE pg_constraint.conrelid OPERATOR(pg_catalog.=) class.oid
             AND pg_constraint.contype OPERATOR(pg_catalog.=) 'n'
             AND pg_constraint.conkey[1] OPERATOR(pg_catalog.=) attribute.attnum
             AND NOT pg_constraint.convalidated
       ) AS never_null,
       ARRAY(
           SELECT needed
           FROM pg_catalog.unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS needed
           WHERE NOT pg_catalog.has_column_privilege(class.oid, attribute.attnum, needed)
           UNION ALL
           SELECT 'DELETE'
           WHERE NOT pg_catalog.has_table_privilege(class.oid, 'DELETE')
       ) AS missing_rights,
       attribute.attgenerated OPERATOR(pg_catalog.<>) ''
           OR attribute.attidentity OPERATOR(pg_catalog.=) 'a' AS is_generated,
       NOT EXISTS (
           SELECT
           FROM pg_catalog.pg_collation
           WHERE pg_collation.oid OPERATOR(pg_catalog.=) attribute.attcollation
             AND NOT pg_collation.collisdeterministic
       ) AS is_compared_by_bytes,
       attribute.atthasdef OR attribute.attidentity OPERATOR(pg_catalog.<>) '' AS filled_by_default,
       EXISTS (
           SELECT
           FROM pg_catalog.pg_index
           WHERE pg_index.indrelid OPERATOR(pg_catalog.=) class.oid
             AND pg_index.indisprimary
             AND pg_index.indimmediate
             AND pg_index.indnkeyatts OPERATOR(pg_catalog.=) 1
             AND pg_index.indkey[0] OPERATOR(pg_catalog.=) attribute.attnum
       ) AS is_primary_key,
       EXISTS (
           SELECT
           FROM pg_catalog.pg_index
           WHERE pg_index.indrelid OPERATOR(pg_catalog.=) class.oid
             AND pg_index.indisvalid
             AND pg_index.indkey[0] OPERATOR(pg_catalog.=) attribute.attnum
       ) AS is_indexed
FROM pg_catalog.pg_class AS class
JOIN pg_catalog.pg_attribute AS attribute
  ON attribute.attrelid OPERATOR(pg_catalog.=) class.oid
 AND attribute.attnum OPERATOR(pg_catalog.>) 0
 AND NOT attribute.attisdropped
WHERE class.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass($1)
ORDER BY attribute.attnum;
