use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use rustix::process::{Pid, Signal};

/// A folder, and processes that use it, none of which outlives this process, however it ends.
///
/// A shell waits for the end of its input, which comes when this value is dropped or this process
/// is gone, even by `kill -9`. It then kills what is left, runs the commands that it was told to
/// run at the end, and removes the folder.
pub(crate) struct Guard {
    folder: PathBuf,
    shell: Child,
    orders: Option<ChildStdin>,
}

const SHELL: &str = r#"
trap '' INT TERM HUP QUIT
pids=
at_end=
while read -r order what; do
    case $order in
        watch) pids="$pids $what" ;;
        at_end) at_end="$what; $at_end" ;;
        forget) kept=; for p in $pids; do [ "$p" = "$what" ] || kept="$kept $p"; done; pids=$kept ;;
    esac
done
for pid in $pids; do kill -QUIT "$pid" 2>/dev/null; kill -CONT "$pid" 2>/dev/null; done
for pid in $pids; do
    tries=0
    while kill -0 "$pid" 2>/dev/null && [ "$tries" -lt 120 ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || kill -KILL "$pid" 2>/dev/null
        sleep 0.05
    done
done
eval "$at_end"
rm -rf -- "$1"
"#;

impl Guard {
    pub(crate) fn new(prefix: &str) -> Self {
        let folder = tempfile::Builder::new().prefix(prefix).tempdir().expect("a folder").keep();
        let mut shell = Command::new("sh")
            .args(["-c", SHELL, "guard"])
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let orders = shell.stdin.take();
        Self { folder, shell, orders }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn watch(&mut self, process: &Child) {
        self.order("watch", process.id());
    }

    pub(crate) fn forget(&mut self, process: &Child) {
        self.order("forget", process.id());
    }

    pub(crate) fn watch_pid(&mut self, pid: i32) {
        self.order("watch", pid);
    }

    pub(crate) fn forget_pid(&mut self, pid: i32) {
        self.order("forget", pid);
    }

    /// Has a shell command of one line run at the end, the last one first.
    pub(crate) fn at_end(&mut self, command: &str) {
        self.order("at_end", command);
    }

    fn order(&mut self, order: &str, about: impl std::fmt::Display) {
        let orders = self.orders.as_mut().expect("taken only when dropped");
        writeln!(orders, "{order} {about}").expect("the guard listens");
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.orders.take());
        self.shell.wait().expect("the guard ends");
    }
}

pub(crate) fn signal(process: &Child, signal: Signal) {
    let pid = i32::try_from(process.id()).expect("a process id");
    signal_pid(pid, signal);
}

pub(crate) fn signal_pid(pid: i32, signal: Signal) {
    let pid = Pid::from_raw(pid).expect("a process id");
    rustix::process::kill_process(pid, signal).expect("the process takes the signal");
}

/// Kills a process that may have ended by itself.
pub(crate) fn kill_process(pid: i32) {
    let pid = Pid::from_raw(pid).expect("a process id");
    let _ = rustix::process::kill_process(pid, Signal::KILL);
}
