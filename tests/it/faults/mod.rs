//! What servers, workers and connections do to each other when they die, and what is true
//! afterwards. Each fault prints a row of one table: `cargo test faults -- --show-output`.

mod each_step;
mod isolation;
mod pool;
mod server_crash;
mod soak;
mod worker_crash;

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use checkpoint_store::PostgresCheckpointStore;
use checkpoint_store::postgres::{Client, NoTls};

use crate::harness::{self, Server, wait_until};

/// Names a file that every row is added to.
const TABLE_VARIABLE: &str = "CHECKPOINT_STORE_FAULT_TABLE";

/// What came of one fault.
pub(crate) struct Row {
    pub(crate) fault: &'static str,
    pub(crate) times: usize,
    /// Acknowledged offsets that were gone, or events that were never applied.
    pub(crate) lost: usize,
    /// Events that were applied more than once.
    pub(crate) twice: usize,
    /// Errors that the store's callers saw.
    pub(crate) errors: usize,
    /// The longest that one call took.
    pub(crate) longest_wait: Duration,
}

impl Row {
    /// Of a test that asserts that nothing was lost and nothing applied twice.
    pub(crate) fn asserted(
        fault: &'static str,
        times: usize,
        errors: usize,
        longest_wait: Duration,
    ) -> Self {
        Self { fault, times, lost: 0, twice: 0, errors, longest_wait }
    }

    /// Prints `| fault | times | lost | applied twice | errors | longest wait |`.
    pub(crate) fn print(&self) {
        let Self { fault, times, lost, twice, errors, longest_wait } = self;
        let wait = longest_wait.as_secs_f64();
        let row = format!("| {fault} | {times} | {lost} | {twice} | {errors} | {wait:.2} s |\n");
        print!("{row}");
        if let Some(path) = std::env::var_os(TABLE_VARIABLE) {
            let mut table = File::options().create(true).append(true).open(path).expect("a file");
            table.write_all(row.as_bytes()).expect("room for a row");
        }
    }
}

/// A store on a pool of the caller's own, of this size and with this time-out.
fn store_on(params: &str, size: u32, timeout: Duration) -> PostgresCheckpointStore {
    PostgresCheckpointStore::new(harness::pool(params, size, timeout))
}

fn process_id(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

/// Kills a backend with `kill -9`, and waits until the server has thrown out all the others and
/// takes connections again.
fn kill_backend_and_wait(server: &Server, pid: i32) {
    let mut witness = server.client();
    server.kill_backend(pid);
    wait_until("the server has noticed", || witness.batch_execute("SELECT").is_err());
    wait_until("the server is back", || Client::connect(&server.params(), NoTls).is_ok());
}

/// This very program, told to run one of its tests in a process of its own.
pub(crate) fn this_program(test: &str) -> Command {
    let mut program = Command::new(std::env::current_exe().expect("this program"));
    program
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    program
}
