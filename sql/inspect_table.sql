WITH expected AS (
    SELECT 1 AS place, 'projection_name' AS name, 'pg_catalog.text'::pg_catalog.regtype AS type
    UNION ALL
    SELECT 2, 'offset', 'pg_catalog.int8'::pg_catalog.regtype
    UNION ALL
    SELECT 3, 'updated_at', 'pg_catalog.timestamptz'::pg_catalog.regtype
)
SELECT CASE
           WHEN class.relkind OPERATOR(pg_catalog.<>) ALL (ARRAY['r', 'p']::pg_catalog."char"[])
           THEN 'it is not a table'
           WHEN class.relkind OPERATOR(pg_catalog.=) 'r' AND EXISTS (
               SELECT FROM pg_catalog.pg_inherits WHERE pg_inherits.inhparent OPERATOR(pg_catalog.=) class.oid
           )
           THEN 'other tables inherit from it, and their rows would count'
           WHEN class.relpersistence OPERATOR(pg_catalog.<>) 'p'
           THEN 'it is unlogged or temporary, and forgets what was saved'
           WHEN pg_catalog.row_security_active(class.oid)
           THEN 'row-level security may hide its rows from the role that is logged in: use its owner, or a role '
                'with BYPASSRLS'
           WHEN attribute.attname IS NULL
           THEN pg_catalog.format('it has no column "%s"', expected.name)
           WHEN attribute.atttypid OPERATOR(pg_catalog.<>) expected.type
           THEN pg_catalog.format(
               'its column "%s" is of type %s, not %s',
               expected.name,
               pg_catalog.format_type(attribute.atttypid, attribute.atttypmod),
               pg_catalog.format_type(expected.type, NULL)
           )
           -- What is written is not null. What was there before may be, where the constraint is not validated.
           WHEN NOT attribute.attnotnull OR EXISTS (
               SELECT
               FROM pg_catalog.pg_constraint
               WHERE pg_constraint.conrelid OPERATOR(pg_catalog.=) class.oid
                 AND pg_constraint.contype OPERATOR(pg_catalog.=) 'n'
                 AND pg_constraint.conkey[1] OPERATOR(pg_catalog.=) attribute.attnum
                 AND NOT pg_constraint.convalidated
           )
           THEN pg_catalog.format('its column "%s" can be null', expected.name)
           WHEN attribute.attgenerated OPERATOR(pg_catalog.<>) ''
             OR attribute.attidentity OPERATOR(pg_catalog.=) 'a'
           THEN pg_catalog.format('its column "%s" is generated', expected.name)
           WHEN EXISTS (
               SELECT
               FROM pg_catalog.pg_collation
               WHERE pg_collation.oid OPERATOR(pg_catalog.=) attribute.attcollation
                 AND NOT pg_collation.collisdeterministic
           )
           THEN pg_catalog.format('the collation of "%s" takes different names for the same', expected.name)
           WHEN expected.name OPERATOR(pg_catalog.=) 'projection_name' AND NOT EXISTS (
               SELECT
               FROM pg_catalog.pg_index
               WHERE pg_index.indrelid OPERATOR(pg_catalog.=) class.oid
                 AND pg_index.indisprimary
                 AND pg_index.indimmediate
                 AND pg_index.indnkeyatts OPERATOR(pg_catalog.=) 1
                 AND pg_index.indkey[0] OPERATOR(pg_catalog.=) attribute.attnum
           )
           THEN pg_catalog.format('its primary key is not "%s" alone', expected.name)
           -- After the last column of ours, the others.
           WHEN expected.name OPERATOR(pg_catalog.=) 'updated_at'
           THEN 'its column "' OPERATOR(pg_catalog.||) (
               SELECT other.attname::pg_catalog.text
               FROM pg_catalog.pg_attribute AS other
               WHERE other.attrelid OPERATOR(pg_catalog.=) class.oid
                 AND other.attnum OPERATOR(pg_catalog.>) 0
                 AND NOT other.attisdropped
                 AND other.attnotnull
                 AND NOT other.atthasdef
                 AND other.attidentity OPERATOR(pg_catalog.=) ''
                 AND NOT EXISTS (SELECT FROM expected WHERE expected.name OPERATOR(pg_catalog.=) other.attname)
               ORDER BY other.attnum
               LIMIT 1
           ) OPERATOR(pg_catalog.||) '" wants a value in every row'
       END AS misfit,
       ARRAY(
           SELECT needed
           FROM pg_catalog.unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS needed
           WHERE NOT pg_catalog.has_column_privilege(class.oid, attribute.attnum, needed)
           UNION ALL
           SELECT 'DELETE'
           WHERE NOT pg_catalog.has_table_privilege(class.oid, 'DELETE')
       ) AS missing_rights,
       EXISTS (
           SELECT
           FROM pg_catalog.pg_index
           WHERE pg_index.indrelid OPERATOR(pg_catalog.=) class.oid
             AND pg_index.indisvalid
             AND pg_index.indkey[0] OPERATOR(pg_catalog.=) attribute.attnum
       ) AS is_indexed
FROM pg_catalog.pg_class AS class
CROSS JOIN expected
LEFT JOIN pg_catalog.pg_attribute AS attribute
  ON attribute.attrelid OPERATOR(pg_catalog.=) class.oid
 AND attribute.attname OPERATOR(pg_catalog.=) expected.name
 AND NOT attribute.attisdropped
WHERE class.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass($1)
ORDER BY expected.place;
