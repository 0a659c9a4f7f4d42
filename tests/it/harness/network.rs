use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use super::free_port;

/// A link to a host of its own, in a network namespace, that can be cut. What is behind the link
/// is a relay to a server on this side.
pub(crate) struct Network {
    shell: Child,
    orders: Mutex<Option<(ChildStdin, BufReader<ChildStdout>)>>,
    here: String,
    there: String,
    relay_port: u16,
}

/// Runs as root, and cleans up at the end of its input, however this process ends. The far end of
/// the link is what is cut: this end then has a route and no answer, as with a pulled plug.
const SHELL: &str = r#"
set -e
trap '' INT TERM HUP QUIT
name=$1 here=$2 there=$3 relay=$4 server=$5
clean_up() { [ -z "$pid" ] || kill "$pid" 2>/dev/null || true; ip netns delete "$name"; }
ip netns add "$name"
trap clean_up EXIT
ip link add "$name-a" type veth peer name "$name-b" netns "$name"
ip addr add "$here/30" dev "$name-a"
ip -n "$name" addr add "$there/30" dev "$name-b"
ip link set "$name-a" up
ip -n "$name" link set "$name-b" up
ip netns exec "$name" socat "TCP-LISTEN:$relay,fork,reuseaddr" "TCP:$here:$server" </dev/null &
pid=$!
echo ready
while read -r order; do
    ip -n "$name" link set "$name-b" "$order"
    echo "$order"
done
"#;

impl Network {
    /// Needs root, or `sudo` without a password, to make a network namespace.
    pub(crate) fn new(server_port: u16) -> Self {
        let id = std::process::id();
        let subnet = format!("10.213.{}", id % 250);
        let (here, there) = (format!("{subnet}.1"), format!("{subnet}.2"));
        let relay_port = free_port();
        let mut command = if rustix::process::geteuid().is_root() {
            Command::new("sh")
        } else {
            let mut sudo = Command::new("sudo");
            sudo.args(["-n", "sh"]);
            sudo
        };
        let mut shell = command
            .args(["-c", SHELL, "network", &format!("cs{}", id % 1_000_000), &here, &there])
            .args([relay_port.to_string(), server_port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh, or sudo, runs");
        let stdin = shell.stdin.take().expect("piped");
        let mut stdout = BufReader::new(shell.stdout.take().expect("piped"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("a line");
        assert_eq!(
            line, "ready\n",
            "a network namespace cannot be made: this test needs the programs ip and socat, and \
             root or sudo without a password"
        );
        Self { shell, orders: Mutex::new(Some((stdin, stdout))), here, there, relay_port }
    }

    /// The address at which the server is to listen.
    pub(crate) fn here(&self) -> &str {
        &self.here
    }

    /// The parameters to reach the server over the link.
    pub(crate) fn params(&self) -> String {
        format!("host={} port={} user=postgres", self.there, self.relay_port)
    }

    pub(crate) fn cut(&self) {
        self.order("down");
    }

    pub(crate) fn mend(&self) {
        self.order("up");
    }

    fn order(&self, order: &str) {
        let mut orders = self.orders.lock().expect("no panic while it is held");
        let (stdin, stdout) = orders.as_mut().expect("taken only when dropped");
        writeln!(stdin, "{order}").expect("the shell listens");
        let mut line = String::new();
        stdout.read_line(&mut line).expect("an answer");
        assert_eq!(line.trim(), order, "the link obeys");
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        drop(self.orders.lock().map(|mut orders| orders.take()));
        self.shell.wait().expect("the shell ends");
    }
}
