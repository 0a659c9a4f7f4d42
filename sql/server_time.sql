SELECT pg_catalog.clock_timestamp() AS now,
       CASE
           WHEN pg_catalog.pg_is_in_recovery() THEN NULL
           WHEN pg_catalog.left(
               pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8
           ) OPERATOR(pg_catalog.<>) '00000001'
           THEN pg_catalog.pg_last_xact_replay_timestamp()
       END AS was_standby_until;
