//! Connection parameters: what is read, and what is said of those that cannot be read, without a
//! piece of them.

use postgres::Config;
use postgres::config::Host;

use crate::{Error, Result};

/// Reads the parameters, and refuses those that would be taken for something else than they are.
///
/// Whatever is said about them is a text of this file: a piece of theirs may be a password in a place
/// where nobody looks for one.
pub(crate) fn parse(params: &str) -> Result<Config> {
    let params = params.trim();
    let config = params.parse::<Config>().map_err(|_| unreadable(params))?;
    let names = [config.get_user(), config.get_dbname()];
    let misread = misread_url(params, &config)
        .or_else(|| config.get_hosts().iter().find_map(misread_host))
        .or_else(|| names.into_iter().flatten().find_map(misread_name))
        .or_else(|| config.get_options().and_then(misread_options));
    match misread {
        Some(reason) => Err(refusal(params, reason)),
        None => Ok(config),
    }
}

const SEPARATOR: &str = "parameters are separated by blanks, not by `;` or `,`: \
                         host=.. port=.. user=.. password=.. dbname=..";
const SPECIAL: &str = "what is special in a URL, `@` in a password say, is to be percent-encoded";

/// A URL whose user and password are read as a host, because the `@` behind them is gone.
fn misread_url(params: &str, config: &Config) -> Option<&'static str> {
    let is_url = ["postgres://", "postgresql://"].iter().any(|scheme| params.starts_with(scheme));
    (is_url && config.get_user().is_none())
        .then_some("a URL names a user: postgres://user@host/database")
}

/// A host that no host is called. The server is not asked, and the name not repeated.
fn misread_host(host: &Host) -> Option<&'static str> {
    let is_odd = |c: char| c.is_whitespace() || c.is_control() || ";=@?#&'\"\\<>".contains(c);
    match host {
        Host::Tcp(name) if name.is_empty() => Some("a host is empty"),
        Host::Tcp(name) if name.contains(['@', '?', '#', '&']) => Some(SPECIAL),
        Host::Tcp(name) if name.contains(is_odd) || name.contains('/') => Some(SEPARATOR),
        #[cfg(unix)]
        Host::Unix(path) if path.to_string_lossy().contains([';', '=', '\n']) => Some(SEPARATOR),
        _ => None,
    }
}

/// A user or a database whose name the server would repeat, with more in it than a name.
fn misread_name(name: &str) -> Option<&'static str> {
    let holds_another = name.contains(' ') && name.to_ascii_lowercase().contains("pass");
    if name.contains([';', '=', ',']) || name.contains(char::is_control) || holds_another {
        Some(SEPARATOR)
    } else if name.contains(['@', '?', '#', '&', '/']) {
        Some(SPECIAL)
    } else {
        None
    }
}

/// Options of the server's that are not settings: it would repeat them.
fn misread_options(options: &str) -> Option<&'static str> {
    let mut words = options.replace("\\ ", "_");
    words.make_ascii_lowercase();
    let is_secret =
        ["password", "passwd", "pwd", "user=", "host="].iter().any(|it| words.contains(it));
    let mut words = words.split_whitespace();
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("-c") {
            Some("") => words.next().unwrap_or_default(),
            Some(setting) => setting,
            None => word.strip_prefix("--").unwrap_or_default(),
        };
        if !setting.contains('=') {
            return Some("`options` are settings of the server: -c name=value");
        }
    }
    is_secret.then_some("`options` hold another parameter: a quote is missing")
}

fn unreadable(params: &str) -> Error {
    if params.contains(';') && !params.contains("://") {
        return refusal(params, SEPARATOR);
    }
    refusal(
        params,
        "the connection parameters cannot be read (invalid connection string): what is special in a URL \
         is to be percent-encoded, and a value with blanks quoted among key=value pairs",
    )
}

/// The most helpful thing to say: about an option that others know, or else the reason.
fn refusal(params: &str, reason: &str) -> Error {
    if params.starts_with("jdbc:") {
        return Error::backend("connect", "parameters do not begin with `jdbc:`: leave it out");
    }
    let foreign = FOREIGN.iter().find(|(name, allowed, _)| {
        value_of(params, name).is_some_and(|value| !allowed.contains(&value))
    });
    match foreign {
        Some((name, _, instead)) => {
            let instead = format!("`{name}` is not read as given (instead: {instead})");
            Error::backend("connect", format!("{reason}; {instead}"))
        }
        None => Error::backend("connect", reason.to_owned()),
    }
}

/// The value that stands behind a name and `=`, wherever something may begin.
fn value_of<'a>(params: &'a str, name: &str) -> Option<&'a str> {
    let lower = params.to_ascii_lowercase();
    let begins = |at: usize| {
        lower[..at].chars().next_back().is_none_or(|c| c.is_whitespace() || ";&?,".contains(c))
    };
    lower.match_indices(name).filter(|(at, _)| begins(*at)).find_map(|(at, _)| {
        let behind = params[at + name.len()..].trim_start().strip_prefix('=')?.trim_start();
        behind.split(|c: char| c.is_whitespace() || ";&,".contains(c)).next()
    })
}

/// What libpq, Npgsql, JDBC and others know and `postgres` does not, or knows fewer values of; and
/// what to do instead.
const FOREIGN: [(&str, &[&str], &str); 35] = [
    ("sslrootcert", &[], "give the certificate to the connector of `connect_tls`"),
    ("sslcert", &[], "give the certificate to the connector of `connect_tls`"),
    ("sslkey", &[], "give the key to the connector of `connect_tls`"),
    ("sslcrl", &[], "give it to the connector of `connect_tls`"),
    ("sslpassword", &[], "give it to the connector of `connect_tls`"),
    ("ssl", &[], "sslmode=require, and a connector that verifies for `connect_tls`"),
    ("requiressl", &[], "sslmode=require"),
    ("gssencmode", &[], "leave it out"),
    ("krbsrvname", &[], "leave it out"),
    ("service", &[], "write the parameters out: no service file is read"),
    ("passfile", &[], "write the password out: no password file is read"),
    ("schema", &[], "builder().schema(..)"),
    ("currentschema", &[], "builder().schema(..)"),
    ("search path", &[], "builder().schema(..)"),
    ("search_path", &[], "builder().schema(..), or options='-c search_path=..'"),
    ("client_encoding", &[], "leave it out: it is always UTF-8"),
    ("fallback_application_name", &[], "application_name"),
    ("statement_timeout", &[], "options='-c statement_timeout=..'"),
    ("lock_timeout", &[], "options='-c lock_timeout=..'"),
    ("connection_limit", &[], "builder().max_connections(..)"),
    ("maximum pool size", &[], "builder().max_connections(..)"),
    ("pool_timeout", &[], "builder().connection_timeout(..)"),
    ("pooling", &[], "leave it out: the store has a pool"),
    ("server", &[], "host"),
    ("username", &[], "user"),
    ("user id", &[], "user"),
    ("uid", &[], "user"),
    ("pwd", &[], "password"),
    ("database", &[], "dbname"),
    ("ssl mode", &[], "sslmode"),
    ("timeout", &[], "connect_timeout"),
    (
        "sslmode",
        &["disable", "prefer", "require"],
        "it is disable, prefer or require; to verify the server, require and a connector that does so, \
         for `connect_tls`",
    ),
    (
        "target_session_attrs",
        &["any", "read-write", "read-only"],
        "it is any, read-write or read-only",
    ),
    ("channel_binding", &["disable", "prefer", "require"], "it is disable, prefer or require"),
    ("load_balance_hosts", &["disable", "random"], "it is disable or random"),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MARK: &str = "hUnT3rzw0";

    fn told(params: &str) -> String {
        match parse(params) {
            Ok(_) => panic!("it was read"),
            Err(Error::Backend { operation: "connect", source, .. }) => source.to_string(),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_others_know_is_named_with_what_to_do_instead() {
        for (params, name, instead) in [
            ("host=a user=b sslmode=verify-full", "`sslmode`", "require"),
            ("host=a sslmode=require sslrootcert=/ca.pem", "`sslrootcert`", "connect_tls"),
            ("host=a target_session_attrs=primary", "`target_session_attrs`", "read-write"),
            ("host=a service=mine", "`service`", "written out"),
            ("postgres://u:p@h/d?schema=app", "`schema`", "builder().schema"),
            ("postgres://u:p@h/d?currentSchema=app", "`currentschema`", "builder().schema"),
            ("jdbc:postgresql://h/d?user=u", "jdbc", "leave it out"),
            ("Host=h;Username=u;Password=p;Database=d", "`username`", "user"),
            ("Server=h;Port=5432;User Id=u;Password=p", "`server`", "host"),
            ("host=a passfile=~/.pgpass", "`passfile`", "password"),
            ("Host=h;Port=5432;Username=u;Password=p", "`username`", "by blanks, not by `;`"),
            ("Host=h;Port=5432;User=u;Password=p;Database=d", "`database`", "user=.. password=.."),
            ("Host=h;Port=5432;User=u;Password=p", "host=..", "by blanks, not by `;`"),
        ] {
            let told = told(params);
            assert!(told.contains(name), "{params}: {told}");
            assert!(told.contains(instead) || instead == "written out", "{params}: {told}");
        }
    }

    #[test]
    fn what_is_fine_is_read() {
        for params in [
            "host=localhost user=app password='a ;=@ b' dbname=app",
            "host=/var/run/postgresql user=app",
            "host=::1 port=5432 user=a.b-c_d$ dbname='with blanks'",
            "host=one.example,two.example port=1,2 target_session_attrs=read-write",
            "postgres://app:p%40%2F%3Bss@[::1]:5432/app?sslmode=require",
            "postgresql://app@host/app\n",
            "  host=localhost\n user=app\n",
            "host=h options='-c search_path=a,b --work_mem=64kB -cjit=off'",
            "host=h options='-c default_transaction_isolation=repeatable\\\\ read'",
            "host=münchen.example user=jürgen dbname=データ",
        ] {
            assert!(parse(params).is_ok(), "{params}");
        }
    }

    /// Valid parameters, with the password in them.
    fn valid() -> impl Strategy<Value = String> {
        let passwords = ["", "-x", ".y!", "$9"].map(|end| format!("{MARK}{end}"));
        let form = |password: String| {
            prop::sample::select(vec![
                format!("host=127.0.0.1 port=5432 user=app password={password} dbname=app"),
                format!("user='app' password='{password}' host='127.0.0.1' dbname='app'"),
                format!("host=127.0.0.1 user=app dbname=app password={password} sslmode=prefer"),
                format!("host=127.0.0.1 password={password} options='-c jit=off' user=app"),
                format!("postgres://app:{password}@127.0.0.1:5432/app"),
                format!(
                    "postgresql://app:{password}@127.0.0.1/app?connect_timeout=3&sslmode=prefer"
                ),
                format!("host=127.0.0.1;port=5432;username=app;password={password};database=app"),
                format!("host=127.0.0.1,user=app,password={password},dbname=app"),
            ])
        };
        prop::sample::select(passwords.to_vec()).prop_flat_map(form)
    }

    #[derive(Debug, Clone)]
    enum Damage {
        Insert(prop::sample::Index, char),
        Replace(prop::sample::Index, char),
        Delete(prop::sample::Index),
        CutOff(prop::sample::Index),
        Swap(prop::sample::Index),
        Everywhere(char, char),
    }

    fn damage() -> impl Strategy<Value = Damage> {
        let odd = || prop::sample::select(" ;,@=&?/:'\"\\#%\n\t.x-".chars().collect::<Vec<_>>());
        let at = any::<prop::sample::Index>;
        prop_oneof![
            (at(), odd()).prop_map(|(at, c)| Damage::Insert(at, c)),
            (at(), odd()).prop_map(|(at, c)| Damage::Replace(at, c)),
            at().prop_map(Damage::Delete),
            at().prop_map(Damage::CutOff),
            at().prop_map(Damage::Swap),
            (odd(), odd()).prop_map(|(from, to)| Damage::Everywhere(from, to)),
        ]
    }

    fn damaged(params: &str, damage: &Damage) -> String {
        let mut chars: Vec<char> = params.chars().collect();
        if chars.len() < 2 {
            return params.to_owned();
        }
        match damage {
            Damage::Insert(at, c) => chars.insert(at.index(chars.len()), *c),
            Damage::Replace(at, c) => {
                let at = at.index(chars.len());
                chars[at] = *c;
            }
            Damage::Delete(at) => drop(chars.remove(at.index(chars.len()))),
            Damage::CutOff(at) => chars.truncate(at.index(chars.len())),
            Damage::Swap(at) => {
                let at = at.index(chars.len() - 1);
                chars.swap(at, at + 1);
            }
            Damage::Everywhere(from, to) => {
                chars.iter_mut().filter(|c| *c == from).for_each(|c| *c = *to);
            }
        }
        chars.into_iter().collect()
    }

    /// Any five characters of the mark in a row.
    fn shows(text: &str) -> bool {
        (0..=MARK.len() - 5).any(|at| text.contains(&MARK[at..at + 5]))
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 20_000,
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// One thing is wrong; two may well make other valid parameters, whose host is the password.
        /// What is refused is not repeated, and what is read has no password in what the server or
        /// the error repeats; but for the user's name in a URL, which may have taken in a part of the
        /// password when the colon between them went elsewhere: nothing tells it from a long name.
        #[test]
        fn no_piece_of_a_password_comes_out(
            params in valid(),
            damage in damage(),
        ) {
            let params = damaged(&params, &damage);
            match parse(&params) {
                Err(error) => {
                    let source = std::error::Error::source(&error).expect("a cause");
                    let shown = format!("{error} {error:?} {error:#?} {source} {source:?}");
                    prop_assert!(!shows(&shown), "{params:?}: {shown}");
                }
                Ok(config) => {
                    let hosts = format!("{:?}", config.get_hosts());
                    prop_assert!(!shows(&hosts), "{params:?}: {hosts}");
                    let options = config.get_options().unwrap_or_default();
                    prop_assert!(!shows(options), "{params:?}: {options}");
                    let user = config.get_user().unwrap_or_default();
                    let may_have_grown = params.starts_with("postgres");
                    prop_assert!(!shows(user) || may_have_grown, "{params:?}: {user}");
                    let dbname = config.get_dbname().unwrap_or_default();
                    prop_assert!(!shows(dbname), "{params:?}: {dbname}");
                }
            }
        }
    }
}
