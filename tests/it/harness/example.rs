use std::env;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::SystemTime;

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
    files.filter_map(|file| modified(&file.expect("a file").path())).max()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
