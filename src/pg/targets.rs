//! The hosts in the connection parameters, one by one, and their addresses.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex};

use postgres::Config;
use postgres::config::Host;

use crate::sync::lock;

const POSTGRES_PORT: u16 = 5432;

/// One of the hosts that the parameters name.
pub(crate) struct Target {
    /// The parameters with this host alone.
    config: Config,
    /// `host:port`
    name: String,
    /// The address, if no host name has to be looked up for it.
    pub(crate) address: Option<Address>,
    known: Mutex<Vec<Address>>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Address {
    pub(crate) name: String,
    /// `None` for a Unix socket.
    pub(crate) tcp: Option<SocketAddr>,
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self { name: address.to_string(), tcp: Some(address) }
    }
}

impl Target {
    /// One target for each host, or what is wrong with the hosts.
    pub(crate) fn list(config: &Config) -> Result<Vec<Arc<Self>>, &'static str> {
        let configs = each_host(config);
        let is_misfit = |count: usize, most: usize| count > most && count != configs.len();
        if configs.is_empty() {
            Err("the parameters name no host")
        } else if is_misfit(config.get_hosts().len(), 0)
            || is_misfit(config.get_hostaddrs().len(), 0)
        {
            Err("host and hostaddr do not have the same number of entries")
        } else if is_misfit(config.get_ports().len(), 1) {
            Err("port does not have one entry, nor as many as there are hosts")
        } else {
            Ok(configs.into_iter().map(Self::new).map(Arc::new).collect())
        }
    }

    fn new(config: Config) -> Self {
        let tcp = |ip: IpAddr| Address::from(SocketAddr::from((ip, port(&config))));
        let address = match (config.get_hostaddrs(), config.get_hosts()) {
            ([ip, ..], _) => Some(tcp(*ip)),
            #[cfg(unix)]
            ([], [Host::Unix(folder), ..]) => {
                let socket = folder.join(format!(".s.PGSQL.{}", port(&config)));
                Some(Address { name: socket.display().to_string(), tcp: None })
            }
            ([], [Host::Tcp(name), ..]) => name.parse().ok().map(tcp),
            ([], []) => None,
        };
        Self { name: name(&config), config, address, known: Mutex::default() }
    }

    /// The name, with the address if the name does not say it.
    pub(crate) fn name_with(&self, address: Option<&Address>) -> String {
        match (&self.address, address.and_then(|address| address.tcp)) {
            (None, Some(tcp)) => format!("{} ({})", self.name, tcp.ip()),
            _ => self.name.clone(),
        }
    }

    /// Looks up the host name, for as long as that takes.
    pub(crate) fn look_up(&self) -> io::Result<Vec<Address>> {
        let addresses: Vec<_> = self.name.to_socket_addrs()?.map(Address::from).collect();
        lock(&self.known).clone_from(&addresses);
        Ok(addresses)
    }

    /// The addresses that the last lookup of the host name found.
    pub(crate) fn known_addresses(&self) -> Vec<Address> {
        lock(&self.known).clone()
    }

    /// The parameters that lead to one of the addresses, and nowhere else.
    pub(crate) fn config(&self, address: &Address) -> Config {
        let mut config = self.config.clone();
        if let (Some(tcp), []) = (address.tcp, config.get_hostaddrs()) {
            config.hostaddr(tcp.ip());
        }
        config
    }
}

/// The parameters with each of the hosts alone.
fn each_host(config: &Config) -> Vec<Config> {
    match config.get_hosts().len().max(config.get_hostaddrs().len()) {
        1 => vec![config.clone()],
        hosts => (0..hosts).map(|i| with_one_host(config, i)).collect(),
    }
}

/// A copy of the parameters in which one host stands for all: hosts cannot be removed from a `Config`.
fn with_one_host(config: &Config, i: usize) -> Config {
    let mut copy = Config::new();
    match config.get_hosts().get(i) {
        Some(Host::Tcp(name)) => drop(copy.host(name)),
        #[cfg(unix)]
        Some(Host::Unix(folder)) => drop(copy.host_path(folder)),
        None => {}
    }
    config.get_hostaddrs().get(i).map(|ip| copy.hostaddr(*ip));
    let ports = config.get_ports();
    ports.get(i).or(ports.first()).map(|port| copy.port(*port));
    config.get_user().map(|user| copy.user(user));
    config.get_password().map(|password| copy.password(password));
    config.get_dbname().map(|name| copy.dbname(name));
    config.get_options().map(|options| copy.options(options));
    config.get_application_name().map(|name| copy.application_name(name));
    config.get_connect_timeout().map(|time| copy.connect_timeout(*time));
    config.get_tcp_user_timeout().map(|time| copy.tcp_user_timeout(*time));
    config.get_keepalives_interval().map(|interval| copy.keepalives_interval(interval));
    config.get_keepalives_retries().map(|retries| copy.keepalives_retries(retries));
    copy.keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding())
        .load_balance_hosts(config.get_load_balance_hosts());
    copy
}

/// The port of a single host.
fn port(config: &Config) -> u16 {
    config.get_ports().first().copied().unwrap_or(POSTGRES_PORT)
}

/// `host:port` of a single host.
fn name(config: &Config) -> String {
    let host = match (config.get_hosts(), config.get_hostaddrs()) {
        ([Host::Tcp(name), ..], _) if !name.is_empty() => name.clone(),
        #[cfg(unix)]
        ([Host::Unix(folder), ..], _) => folder.display().to_string(),
        (_, [ip, ..]) => ip.to_string(),
        (_, []) => String::new(),
    };
    format!("{host}:{}", port(config))
}

/// Where a connection was to go, without the user.
pub(crate) fn server_name(config: &Config) -> String {
    let names: Vec<_> = each_host(config).iter().map(name).collect();
    if names.is_empty() {
        return "no host is given".to_owned();
    }
    format!("server {}", names.join(","))
}

#[cfg(test)]
mod tests {
    use postgres::config::SslNegotiation;

    use super::*;

    /// Every parameter that `postgres` knows, each other than its default.
    const ALL: &str = "user=u password=p dbname=d options=-cx=1 application_name=a \
         sslmode=require sslnegotiation=direct connect_timeout=1 tcp_user_timeout=2 keepalives=0 \
         keepalives_idle=3 keepalives_interval=4 keepalives_retries=5 \
         target_session_attrs=read-write channel_binding=require load_balance_hosts=random";

    fn config(params: &str) -> Config {
        params.parse().expect("valid parameters")
    }

    fn targets(params: &str) -> Vec<Arc<Target>> {
        Target::list(&config(params)).expect("hosts that fit together")
    }

    #[test]
    fn each_host_is_tried_with_all_the_other_parameters() {
        let targets = targets(&format!("{ALL} host=one,two hostaddr=10.0.0.1,10.0.0.2 port=1,2"));
        assert_eq!(targets.len(), 2);
        for (target, place) in targets
            .iter()
            .zip(["host=one hostaddr=10.0.0.1 port=1", "host=two hostaddr=10.0.0.2 port=2"])
        {
            let expected = config(&format!("{ALL} {place}"));
            let address = target.address.as_ref().expect("it is given");
            let copy = target.config(address);
            assert_eq!(format!("{copy:?}"), format!("{expected:?}"));
            // These two are not in that text.
            assert_eq!(copy.get_password(), Some(b"p".as_slice()));
            assert_eq!(copy.get_ssl_negotiation(), SslNegotiation::Direct);
        }
    }

    /// A parameter that a later version of `postgres` adds has to be copied as well.
    #[test]
    fn every_parameter_that_a_config_shows_is_known_here() {
        const KNOWN: &str = "user password dbname options application_name ssl_mode host hostaddr \
             port connect_timeout tcp_user_timeout keepalives keepalives_idle keepalives_interval \
             keepalives_retries target_session_attrs channel_binding load_balance_hosts";
        let all = config(&format!("{ALL} host=h hostaddr=10.0.0.1 port=1"));
        let shown = format!("{all:#?}");
        // The fields of the config stand two levels deep; those of their values stand deeper.
        let fields = shown.lines().filter_map(|line| {
            let line = line.strip_prefix("        ")?;
            line.split_once(": ").map(|(name, _)| name).filter(|name| !name.starts_with(' '))
        });
        assert_eq!(fields.collect::<Vec<_>>(), KNOWN.split_whitespace().collect::<Vec<_>>());
        // And each differs from its default, so the test above sees whether it is copied.
        let default = format!("{:#?}", Config::new());
        let is_default = |line: &str| default.lines().any(|it| it == line);
        let unset = shown.lines().filter(|line| line.contains(": ") && is_default(line));
        assert_eq!(unset.collect::<Vec<_>>(), ["    config: Config {"], "{shown}");
    }

    #[test]
    fn one_host_keeps_the_parameters_as_they_are() {
        let all = format!("{ALL} host=one port=1");
        let [target] = &targets(&all)[..] else { panic!("one host") };
        assert!(target.address.is_none(), "its name has to be looked up");
        let copy = target.config(&SocketAddr::from(([10, 0, 0, 1], 1)).into());
        let expected = config(&format!("{all} hostaddr=10.0.0.1"));
        assert_eq!(format!("{copy:?}"), format!("{expected:?}"));
    }

    #[test]
    fn a_host_is_named_with_its_port() {
        for (params, names) in [
            ("host=a", "server a:5432"),
            ("host=a,b port=1,2", "server a:1,b:2"),
            ("host=a,b port=7", "server a:7,b:7"),
            ("hostaddr=10.0.0.1", "server 10.0.0.1:5432"),
            ("host='' hostaddr=10.0.0.1", "server 10.0.0.1:5432"),
            ("host=/run port=1", "server /run:1"),
            ("user=u", "no host is given"),
        ] {
            assert_eq!(server_name(&config(params)), names);
        }
    }

    #[test]
    fn hosts_addresses_and_ports_that_do_not_fit_together_are_an_error() {
        for (params, part) in [
            ("user=u", "no host"),
            ("host=a,b hostaddr=10.0.0.1", "host and hostaddr"),
            ("host=a hostaddr=10.0.0.1,10.0.0.2", "host and hostaddr"),
            ("host=a,b port=1,2,3", "port"),
            ("host=a port=1,2", "port"),
        ] {
            let reason = Target::list(&config(params)).map(|_| ()).expect_err(params);
            assert!(reason.contains(part), "{params}: {reason}");
        }
    }
}
