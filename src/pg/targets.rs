//! The hosts in the connection parameters, one by one, and their addresses.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Mutex, PoisonError};

use postgres::Config;
use postgres::config::Host;

const POSTGRES_PORT: u16 = 5432;

/// One of the hosts that the parameters name.
pub(crate) struct Target {
    /// The parameters with this host alone.
    config: Config,
    /// `host:port`
    name: String,
    location: Location,
    /// The addresses that the last lookup of the host name found.
    known: Mutex<Vec<Address>>,
}

enum Location {
    Name(String, u16),
    Address(Address),
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Address {
    Tcp(SocketAddr),
    #[cfg(unix)]
    Unix(std::path::PathBuf),
}

impl Target {
    /// One target for each host, or what is wrong with the hosts.
    pub(crate) fn list(config: &Config) -> Result<Vec<Self>, &'static str> {
        let (hosts, addresses, ports) =
            (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
        let targets: Vec<_> = places(config).map(|place| Self::new(config, &place)).collect();
        let is_misfit = |count: usize, most: usize| count > most && count != targets.len();
        if targets.is_empty() {
            Err("the parameters name no host")
        } else if is_misfit(hosts.len(), 0) || is_misfit(addresses.len(), 0) {
            Err("host and hostaddr do not have the same number of entries")
        } else if is_misfit(ports.len(), 1) {
            Err("port does not have one entry, nor as many as there are hosts")
        } else {
            Ok(targets)
        }
    }

    fn new(config: &Config, place: &Place<'_>) -> Self {
        let is_only_one = config.get_hosts().len().max(config.get_hostaddrs().len()) == 1;
        let config = if is_only_one { config.clone() } else { with_one_host(config, place) };
        let location = match (place.ip, place.host) {
            (Some(ip), _) => Location::Address(Address::Tcp((ip, place.port).into())),
            #[cfg(unix)]
            (None, Some(Host::Unix(folder))) => {
                Location::Address(Address::Unix(folder.join(format!(".s.PGSQL.{}", place.port))))
            }
            (None, Some(Host::Tcp(name))) => match name.parse::<IpAddr>() {
                Ok(ip) => Location::Address(Address::Tcp((ip, place.port).into())),
                Err(_) => Location::Name(name.clone(), place.port),
            },
            (None, None) => unreachable!("a place has a host or an address"),
        };
        Self { config, name: place.to_string(), location, known: Mutex::default() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The name, with the address if the name does not say it.
    pub(crate) fn name_with(&self, address: &Address) -> String {
        match (&self.location, address) {
            (Location::Name(..), Address::Tcp(address)) => {
                format!("{} ({})", self.name, address.ip())
            }
            _ => self.name.clone(),
        }
    }

    /// The address, if no host name has to be looked up for it.
    pub(crate) fn address(&self) -> Option<&Address> {
        match &self.location {
            Location::Address(address) => Some(address),
            Location::Name(..) => None,
        }
    }

    /// Looks up the host name, for as long as that takes.
    pub(crate) fn look_up(&self) -> io::Result<Vec<Address>> {
        let addresses: Vec<_> = match &self.location {
            Location::Address(address) => vec![address.clone()],
            Location::Name(name, port) => {
                (name.as_str(), *port).to_socket_addrs()?.map(Address::Tcp).collect()
            }
        };
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&addresses);
        Ok(addresses)
    }

    /// The addresses as far as they are known without a lookup.
    pub(crate) fn known_addresses(&self) -> Vec<Address> {
        match &self.location {
            Location::Address(address) => vec![address.clone()],
            Location::Name(..) => self.known.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// The parameters that lead to one of the addresses, and nowhere else.
    pub(crate) fn config(&self, address: &Address) -> Config {
        let mut config = self.config.clone();
        if let (Address::Tcp(address), []) = (address, config.get_hostaddrs()) {
            config.hostaddr(address.ip());
        }
        config
    }
}

/// One entry of the lists of hosts, addresses and ports. It has a host or an address, or both.
struct Place<'a> {
    host: Option<&'a Host>,
    ip: Option<IpAddr>,
    port: u16,
}

fn places(config: &Config) -> impl Iterator<Item = Place<'_>> {
    let (hosts, addresses, ports) =
        (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    (0..hosts.len().max(addresses.len())).map(move |i| Place {
        host: hosts.get(i),
        ip: addresses.get(i).copied(),
        port: ports.get(i).or(ports.first()).copied().unwrap_or(POSTGRES_PORT),
    })
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.host, self.ip) {
            (Some(Host::Tcp(name)), _) if !name.is_empty() => f.write_str(name)?,
            #[cfg(unix)]
            (Some(Host::Unix(folder)), _) => folder.display().fmt(f)?,
            (_, Some(ip)) => ip.fmt(f)?,
            (_, None) => {}
        }
        write!(f, ":{}", self.port)
    }
}

/// A copy of the parameters in which one host stands for all: hosts cannot be removed from a `Config`.
fn with_one_host(config: &Config, place: &Place<'_>) -> Config {
    let mut copy = Config::new();
    match place.host {
        Some(Host::Tcp(name)) => drop(copy.host(name)),
        #[cfg(unix)]
        Some(Host::Unix(folder)) => drop(copy.host_path(folder)),
        None => {}
    }
    if let Some(ip) = place.ip {
        copy.hostaddr(ip);
    }
    copy.port(place.port);
    if let Some(user) = config.get_user() {
        copy.user(user);
    }
    if let Some(password) = config.get_password() {
        copy.password(password);
    }
    if let Some(dbname) = config.get_dbname() {
        copy.dbname(dbname);
    }
    if let Some(options) = config.get_options() {
        copy.options(options);
    }
    if let Some(name) = config.get_application_name() {
        copy.application_name(name);
    }
    if let Some(timeout) = config.get_connect_timeout() {
        copy.connect_timeout(*timeout);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        copy.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        copy.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        copy.keepalives_retries(retries);
    }
    copy.keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding())
        .load_balance_hosts(config.get_load_balance_hosts());
    copy
}

/// Where a connection was to go, without the user.
pub(crate) struct ServerName(String);

impl ServerName {
    pub(crate) fn of(config: &Config) -> Self {
        Self(places(config).map(|place| place.to_string()).collect::<Vec<_>>().join(","))
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_str() {
            "" => f.write_str("no host is given"),
            server => write!(f, "server {server}"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            #[cfg(unix)]
            Self::Unix(path) => path.display().fmt(f),
        }
    }
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

    fn targets(params: &str) -> Vec<Target> {
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
            let address = target.address().expect("it is given");
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
        assert!(target.address().is_none(), "its name has to be looked up");
        let copy = target.config(&Address::Tcp(([10, 0, 0, 1], 1).into()));
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
            assert_eq!(ServerName::of(&config(params)).to_string(), names);
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
