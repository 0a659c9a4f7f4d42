use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::guard::Guard;
use super::server::{Options, Server, server_user};

/// A network namespace with a link to it, to start a server in and cut it off.
pub(crate) struct Network {
    namespace: String,
    address: String,
    /// Takes it all away at the end.
    _guard: Guard,
    /// One at a time: they share their names and addresses.
    _turn: MutexGuard<'static, ()>,
}

const NEEDS: &str = "this test makes a network namespace and a link to it, and needs root, \
                     or sudo without a password, to run `ip`";

impl Network {
    pub(crate) fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let id = std::process::id();
        let namespace = format!("checkpoint-{id}");
        let (outer, inner) = (format!("cpo{id}"), "inner");
        let net = format!("10.{}.{}.{}", 128 + ((id >> 14) & 127), (id >> 6) & 255, (id & 63) * 4);
        let at = |host: u32| {
            let (three, last) = net.rsplit_once('.').expect("an address has dots");
            format!("{three}.{}", last.parse::<u32>().expect("a number") + host)
        };
        let mut guard = Guard::new("checkpoint-store-net-");
        let ip = privileged("ip").join(" ");
        // Nothing that is meant for the namespace may look for another way.
        guard.at_end(&format!("{ip} route del blackhole {net}/30 metric 100000"));
        run(&["ip", "route", "add", "blackhole", &format!("{net}/30"), "metric", "100000"]);
        guard.at_end(&format!("{ip} netns del {namespace}"));
        run(&["ip", "netns", "add", &namespace]);
        guard.at_end(&format!("{ip} link del {outer}"));
        run(&[
            "ip", "link", "add", &outer, "type", "veth", "peer", "name", inner, "netns", &namespace,
        ]);
        run(&["ip", "addr", "add", &format!("{}/30", at(1)), "dev", &outer]);
        run(&["ip", "-n", &namespace, "addr", "add", &format!("{}/30", at(2)), "dev", inner]);
        run(&["ip", "-n", &namespace, "link", "set", "lo", "up"]);
        run(&["ip", "link", "set", &outer, "up"]);
        let network = Self { namespace, address: at(2), _guard: guard, _turn: turn };
        network.mend();
        network
    }

    /// The address of whoever listens inside.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// What to start a program through so that it runs inside, as the server's user.
    pub(crate) fn inside(&self) -> Vec<String> {
        let me = || (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let (uid, gid) = server_user().map_or_else(me, |user| (user.uid, user.gid));
        let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={gid}"));
        let setpriv = ["setpriv", &uid, &gid, "--clear-groups", "--"];
        let mut through = privileged("ip");
        through.extend(["netns", "exec", &self.namespace].map(ToOwned::to_owned));
        through.extend(setpriv.map(ToOwned::to_owned));
        through
    }

    /// A server inside, which finds out soon that a client is gone, and releases what it held.
    pub(crate) fn server(&self) -> Server {
        Server::start(Options {
            listen: self.address().to_owned(),
            hba: Some(format!("host all all {}/30 trust\n", self.address())),
            through: self.inside(),
            ..Options::fast()
                .set("tcp_keepalives_idle", "1")
                .set("tcp_keepalives_interval", "1")
                .set("tcp_keepalives_count", "2")
        })
    }

    /// Takes the link down, at the far end.
    pub(crate) fn cut(&self) {
        run(&["ip", "-n", &self.namespace, "link", "set", "inner", "down"]);
    }

    pub(crate) fn mend(&self) {
        run(&["ip", "-n", &self.namespace, "link", "set", "inner", "up"]);
    }
}

/// How to run a program as root.
pub(crate) fn privileged(program: &str) -> Vec<String> {
    let sudo: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["sudo", "-n"] };
    sudo.iter().chain([&program]).map(ToString::to_string).collect()
}

fn run(command: &[&str]) {
    let [program, arguments @ ..] = command else { unreachable!("a command has a program") };
    let through = privileged(program);
    let output = Command::new(&through[0])
        .args(&through[1..])
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{NEEDS}: {}: {error}", through.join(" ")));
    assert!(
        output.status.success(),
        "{NEEDS}: {}: {}",
        command.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
}
