use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::SystemTime;

use rustix::process::Signal;

use super::{Guard, signal, wait_until};

/// The process of an example, without the input and the servers of whoever runs the tests. Cargo
/// puts it next to the folder of the test binaries.
///
/// `source` is its file or folder in `examples/`: a program older than that is not what is tested.
pub(crate) fn example(name: &str, source: &str) -> Command {
    let test = env::current_exe().expect("a path");
    let profile = test.parent().and_then(Path::parent).expect("target/<profile>/deps");
    let program = profile.join("examples").join(format!("{name}{}", env::consts::EXE_SUFFIX));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(source);
    assert!(
        modified(&program).is_some_and(|built| Some(built) >= latest(&source)),
        "{} is missing or out of date: `cargo test` builds it, unless it is told which targets to \
         test; then run `cargo build --all-features --example {name}` first",
        program.display()
    );
    let mut command = Command::new(program);
    command.env_remove("DATABASE_URL").env_remove("REDIS_URL").stdin(Stdio::null());
    command
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|file| file.modified()).ok()
}

/// When a file, or the newest of a folder's, was last changed.
fn latest(source: &Path) -> Option<SystemTime> {
    if source.is_file() {
        return modified(source);
    }
    let files = source.read_dir().expect("the example's folder");
    let paths = files.map(|file| file.expect("a file").path());
    let pictures = |path: &PathBuf| path.extension().is_some_and(|it| it == "png"); // not built in
    paths.filter(|path| !pictures(path)).filter_map(|path| modified(&path)).max()
}

/// A program at work. When this value is dropped it is killed, as by `kill -9`.
pub(crate) struct Running {
    process: Child,
    guard: Guard,
}

impl Running {
    pub(crate) fn start(program: &mut Command) -> Self {
        let mut guard = Guard::new("checkpoint-store-example-");
        let file = |name| File::create(guard.folder().join(name)).expect("a file");
        let process = program.stdout(file("stdout")).stderr(file("stderr")).spawn();
        let process = process.expect("the program starts");
        guard.watch(&process);
        Self { process, guard }
    }

    /// What it has written to its standard output or error so far.
    fn told(&self, stream: &str) -> Vec<u8> {
        fs::read(self.guard.folder().join(stream)).expect("a file")
    }

    /// Waits until something holds, and fails loudly when the program ends before.
    pub(crate) fn wait_until(&mut self, what: &str, mut holds: impl FnMut() -> bool) {
        wait_until(what, || {
            let ended = self.process.try_wait().expect("a child's state");
            let told = || String::from_utf8_lossy(&self.told("stderr")).into_owned();
            holds() || ended.is_some_and(|status| panic!("{status} before {what}: {}", told()))
        });
    }

    pub(crate) fn wait_until_it_says(&mut self, text: &str) {
        self.wait_until_it_writes("stdout", text);
    }

    pub(crate) fn wait_until_it_complains(&mut self, text: &str) {
        self.wait_until_it_writes("stderr", text);
    }

    fn wait_until_it_writes(&mut self, stream: &str, text: &str) {
        let file = self.guard.folder().join(stream);
        self.wait_until(&format!("it writes {text:?}"), || {
            fs::read_to_string(&file).expect("UTF-8").contains(text)
        });
    }

    /// What Ctrl-C does.
    pub(crate) fn interrupt(&self) {
        signal(&self.process, Signal::INT);
    }

    /// What the end of a container or a service does.
    pub(crate) fn terminate(&self) {
        signal(&self.process, Signal::TERM);
    }

    /// Waits until it has ended.
    pub(crate) fn output(mut self) -> Output {
        wait_until("it ends", || self.process.try_wait().expect("a child's state").is_some());
        let status = self.process.wait().expect("it has ended");
        Output { status, stdout: self.told("stdout"), stderr: self.told("stderr") }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        self.guard.forget(&self.process);
    }
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What it said, after it ended well.
#[track_caller]
pub(crate) fn success(output: &Output) -> String {
    assert!(output.status.success(), "{}\n{}{}", output.status, stdout(output), stderr(output));
    stdout(output)
}

/// What it complained about, after it failed.
#[track_caller]
pub(crate) fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}{}", stdout(output), stderr(output));
    stderr(output)
}
