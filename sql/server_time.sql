SELECT pg_catalog.clock_timestamp() AS now,
       pg_catalog.pg_last_xact_replay_timestamp() AS was_standby_until;
