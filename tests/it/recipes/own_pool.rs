//! A pool of the caller's own: its limits, what it prints, and passwords that expire.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use std::{fs, thread};

use checkpoint_store::postgres::{Client, Config, NoTls};
use checkpoint_store::r2d2::{HandleError, ManageConnection, Pool};
use checkpoint_store::r2d2_postgres::PostgresConnectionManager;
use checkpoint_store::{CheckpointStore, Error, PostgresCheckpointStore, Result};

use super::until_done;
use crate::harness::{self, Options, Server};

fn pool(mut config: Config) -> Pool<PostgresConnectionManager<NoTls>> {
    config.connect_timeout(Duration::from_secs(4)).tcp_user_timeout(Duration::from_secs(10));
    config.keepalives_idle(Duration::from_secs(10)).keepalives_interval(Duration::from_secs(3));
    config.keepalives_retries(3);
    Pool::builder()
        .test_on_check_out(false)
        .error_handler(Box::new(PrintCauses))
        .build_unchecked(PostgresConnectionManager::new(config, NoTls))
}

#[derive(Debug)]
struct PrintCauses;

impl<E: std::error::Error + Send + Sync + 'static> HandleError<E> for PrintCauses {
    fn handle_error(&self, error: E) {
        eprintln!("{}", Error::backend("connect", error).report()); // with its causes
    }
}

/// For passwords that expire, in place of `PostgresConnectionManager`.
struct TokenManager<F> {
    config: Config,
    token: F,
}

impl<F: Fn() -> Result<String> + Send + Sync + 'static> ManageConnection for TokenManager<F> {
    type Connection = Client;
    type Error = Error;

    fn connect(&self) -> Result<Client> {
        Ok(self.config.clone().password((self.token)()?).connect(NoTls)?)
    }

    fn is_valid(&self, client: &mut Client) -> Result<()> {
        Ok(client.is_valid(Duration::from_secs(2))?)
    }

    fn has_broken(&self, client: &mut Client) -> bool {
        client.is_closed()
    }
}

fn connect_with_token(params: &str, file: PathBuf) -> Result<PostgresCheckpointStore> {
    let token = move || Ok(fs::read_to_string(&file)?.trim().to_owned());
    PostgresCheckpointStore::builder().password_provider(token).connect(params)
}

#[test]
fn a_pool_of_the_callers_own_prints_the_causes_and_works() {
    let options = Options { password: Some("correct horse".to_owned()), ..Options::fast() };
    let server = Server::start(options);
    let mut config: Config = server.params().parse().unwrap();
    let refused = config.password("wrong").connect(NoTls).err().unwrap();
    assert!(!refused.to_string().contains("password authentication failed"));
    let printed = Error::backend("connect", refused).report().to_string();
    assert!(printed.contains("password authentication failed"), "{printed}");
    let store = PostgresCheckpointStore::new(pool(config.password("correct horse").clone()));
    store.migrate().unwrap();
    store.save("orders", 42).unwrap();
    assert_eq!(store.get("orders").unwrap(), 42);
}

const PAUSE: Duration = Duration::from_millis(500);

#[test]
fn a_pool_with_a_manager_of_its_own_takes_the_password_of_the_moment() {
    let options = Options { password: Some("correct horse".to_owned()), ..Options::fast() };
    let server = Server::start(options);
    let mut config: Config = server.params().parse().unwrap();
    let mut admin = config.password("correct horse").connect(NoTls).unwrap();
    admin.batch_execute("CREATE ROLE worker LOGIN SUPERUSER PASSWORD 'token 0'").unwrap();
    let (number, is_away): &(AtomicU32, AtomicBool) = Box::leak(Box::default());
    let token = move || {
        if is_away.load(Ordering::SeqCst) {
            return Err(Error::unavailable("token", "the service is away"));
        }
        Ok(format!("token {}", number.load(Ordering::SeqCst)))
    };
    let config = format!("host=127.0.0.1 port={} user=worker dbname=postgres", server.port());
    let pool = Pool::builder()
        .max_size(4)
        .connection_timeout(Duration::from_secs(4)) // r2d2 pauses up to half of it between two logins
        .test_on_check_out(false)
        .error_handler(Box::new(PrintCauses))
        .build_unchecked(TokenManager { config: config.parse().unwrap(), token });
    let store = PostgresCheckpointStore::new(pool);
    store.migrate().unwrap();
    admin.batch_execute("CREATE TABLE counted AS SELECT 0::bigint AS batches").unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                until_done(&done, || {
                    let applied = store.project("orders", |tx, offset| {
                        tx.execute("UPDATE counted SET batches = batches + 1", &[])?;
                        Ok(Some(offset + 1))
                    });
                    match applied {
                        Ok(_) => {}
                        Err(error) if error.is_transient() => thread::sleep(PAUSE),
                        Err(error) => panic!("{}", error.report()),
                    }
                });
            });
        }
        for round in 1..=5 {
            is_away.store(round == 3, Ordering::SeqCst);
            admin.batch_execute(&format!("ALTER ROLE worker PASSWORD 'token {round}'")).unwrap();
            number.store(round, Ordering::SeqCst);
            harness::end_sessions(&mut admin);
            if round == 3 {
                thread::sleep(PAUSE); // for so long no token is to be had
                is_away.store(false, Ordering::SeqCst);
            }
            let so_far = "SELECT COALESCE(max(\"offset\"), 0) FROM projection_checkpoints";
            let mut at = || admin.query_one(so_far, &[]).unwrap().get::<_, i64>(0);
            let before = at();
            harness::wait_until("they are at work again", || at() > before + 20);
        }
        done.store(true, Ordering::SeqCst);
    });
    let counted: i64 = admin.query_one("SELECT batches FROM counted", &[]).unwrap().get(0);
    assert_eq!(store.get("orders").unwrap(), counted);
}

#[test]
fn a_password_that_was_rotated_is_read_anew_for_the_next_connection() {
    let options = Options { password: Some("correct horse".to_owned()), ..Options::fast() };
    let server = Server::start(options);
    let mut config: Config = server.params().parse().unwrap();
    let mut admin = config.password("correct horse").connect(NoTls).unwrap();
    admin.batch_execute("CREATE ROLE worker LOGIN SUPERUSER PASSWORD 'token 0'").unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "token 0\n").unwrap();
    let params = format!("host=127.0.0.1 port={} user=worker dbname=postgres", server.port());
    let store = connect_with_token(&params, file.path().to_owned()).unwrap();
    store.migrate().unwrap();
    store.save("orders", 42).unwrap();
    for round in 1..=3 {
        admin.batch_execute(&format!("ALTER ROLE worker PASSWORD 'token {round}'")).unwrap();
        fs::write(file.path(), format!("token {round}\n")).unwrap();
        harness::end_sessions(&mut admin);
        assert_eq!(store.get("orders").unwrap(), 42);
    }
}
