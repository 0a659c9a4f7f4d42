use checkpoint_store::postgres::NoTls;
use checkpoint_store::postgres::types::Type;
use checkpoint_store::r2d2::Pool;
use checkpoint_store::r2d2_postgres::PostgresConnectionManager;
use checkpoint_store::{CheckpointStore, PostgresCheckpointStore};

use super::{Server, client, store};

/// The upsert as it is written without this crate, which does not look at what the server has stored.
pub(super) const SAVE: &str = "
    INSERT INTO projection_checkpoints (projection_name, \"offset\", updated_at)
    VALUES ($1, $2, clock_timestamp())
    ON CONFLICT (projection_name)
    DO UPDATE SET \"offset\" = EXCLUDED.\"offset\", updated_at = clock_timestamp()";

/// Ten projections that take turns, with an offset that goes up.
pub(crate) struct Turns {
    names: Vec<String>,
    offset: i64,
}

impl Turns {
    pub(crate) fn new() -> Self {
        Self { names: (0..10).map(|number| format!("projection {number}")).collect(), offset: 0 }
    }

    pub(crate) fn next(&mut self) -> (&str, i64) {
        self.offset += 1;
        let turn = usize::try_from(self.offset).expect("not negative") % self.names.len();
        (&self.names[turn], self.offset)
    }
}

pub(crate) type Save = Box<dyn FnMut(&str, i64)>;
pub(crate) type Way = (&'static str, fn(&Server) -> Save);

pub(crate) const ROUND_TRIP: &str = "empty round trip";
pub(crate) const BARE_PREPARED: &str = "bare prepared";
pub(crate) const PREPARED: &str = "ours, prepared";
pub(crate) const BARE_TYPED: &str = "bare execute_typed";
pub(crate) const OURS: &str = "ours";
pub(crate) const GROUPED: &str = "ours, group commit";
pub(crate) const BY_HAND: &str = "by hand";

/// The ways to save that are compared, from the floor up: what the network alone costs, the
/// statement on a client without a pool, ours, and what is written where nobody thinks about it.
pub(crate) const WAYS: [Way; 7] = [
    (ROUND_TRIP, round_trip),
    (BARE_PREPARED, bare_prepared),
    (PREPARED, ours_prepared),
    (BARE_TYPED, bare_typed),
    (OURS, ours),
    (GROUPED, ours_grouped),
    (BY_HAND, by_hand),
];

fn round_trip(server: &Server) -> Save {
    let mut client = client(&server.params());
    Box::new(move |_, _| drop(client.simple_query("").expect("an answer")))
}

fn bare_prepared(server: &Server) -> Save {
    let mut client = client(&server.params());
    let prepared = client.prepare(SAVE).expect("a statement");
    Box::new(move |projection, offset| {
        client.execute(&prepared, &[&projection, &offset]).expect("saved");
    })
}

fn ours_prepared(server: &Server) -> Save {
    let store = PostgresCheckpointStore::builder()
        .prepared_statements(true)
        .connect(&server.params())
        .expect("a store");
    through(store)
}

fn bare_typed(server: &Server) -> Save {
    let mut client = client(&server.params());
    Box::new(move |projection, offset| {
        client
            .execute_typed(SAVE, &[(&projection, Type::TEXT), (&offset, Type::INT8)])
            .expect("saved");
    })
}

fn ours(server: &Server) -> Save {
    through(store(server))
}

fn ours_grouped(server: &Server) -> Save {
    let builder = PostgresCheckpointStore::builder().group_commit(true);
    through(builder.connect(&server.params()).expect("a store"))
}

fn through(store: impl CheckpointStore + 'static) -> Save {
    Box::new(move |projection, offset| store.save(projection, offset).expect("saved"))
}

fn by_hand(server: &Server) -> Save {
    let params = server.params().parse().expect("valid parameters");
    let manager = PostgresConnectionManager::new(params, NoTls);
    let pool = Pool::new(manager).expect("a pool with the defaults of r2d2");
    Box::new(move |projection, offset| {
        let mut client = pool.get().expect("a connection");
        client.execute(SAVE, &[&projection, &offset]).expect("saved");
    })
}
