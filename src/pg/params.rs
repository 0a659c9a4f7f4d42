//! Connection parameters: what can be read is tried, and no message repeats what may be a password.

use std::error::Error as _;

use postgres::Config;
use postgres::config::Host;

use crate::{Error, Result};

const URL: &str = "write postgres://user:password@host/database?option=value&option=value, and \
                   percent-encode special characters, such as @ as %40";
const PAIRS: &str = "write host=.. port=.. user=.. password=.. dbname=.., separated by blanks, not by \
                     `;` or `,`, and quote a value that holds blanks: password='a b'";

/// Reads the parameters. Of those that can be read, it refuses only what a message would repeat
/// although it looks like a password.
pub(crate) fn parse(params: &str) -> Result<Config> {
    let params = params.trim();
    let reason = match params.parse::<Config>() {
        Ok(config) => match indiscretion(&config) {
            Some(name) => {
                format!("{name} seems to hold another option or a password; {}", form(params))
            }
            None => return Ok(config),
        },
        Err(error) => unreadable(params, &cause(&error)),
    };
    Err(Error::backend("connect", reason))
}

fn is_url(params: &str) -> bool {
    params.starts_with("postgres://") || params.starts_with("postgresql://")
}

fn form(params: &str) -> &'static str {
    if is_url(params) { URL } else { PAIRS }
}

/// The parameter that must not get into a message: the store names the hosts, and a server repeats the
/// names that it does not know and the options that it refuses.
fn indiscretion(config: &Config) -> Option<&'static str> {
    let is_odd = |c: char| c.is_whitespace() || c.is_control() || "@;=/?#&'\"\\<>".contains(c);
    let is_no_host = |host: &Host| match host {
        Host::Tcp(name) => name.contains(is_odd),
        #[cfg(unix)]
        Host::Unix(path) => holds_secret(&path.to_string_lossy()),
    };
    let is_no_name = |name: &str| holds_secret(name) || name.contains(['\n', '\r']);
    let are_no_settings = |options: &str| holds_secret(options) || holds_stray_word(options);
    let suspects = [
        ("host", config.get_hosts().iter().any(is_no_host)),
        ("user", config.get_user().is_some_and(is_no_name)),
        ("dbname", config.get_dbname().is_some_and(is_no_name)),
        ("options", config.get_options().is_some_and(are_no_settings)),
    ];
    suspects.into_iter().find_map(|(name, is_suspect)| is_suspect.then_some(name))
}

/// Whether it holds `password=` or the like, or a URL with a login.
fn holds_secret(text: &str) -> bool {
    let text = text.to_ascii_lowercase().replace("%3d", "=");
    let is_assigned_secret = |(at, _)| {
        let name: &str = text[..at].trim_end();
        let word = name.rsplit(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
        ["password", "passwd", "pwd"].iter().any(|secret| word.ends_with(secret))
            || ["pass", "passphrase", "pw", "secret", "token"].contains(&word)
    };
    text.match_indices('=').any(is_assigned_secret) || text.contains("://") && text.contains('@')
}

/// Whether there is a word that is neither a setting nor a switch nor the argument of one.
fn holds_stray_word(options: &str) -> bool {
    let options = options.replace("\\ ", "_");
    let mut before = "";
    options.split_whitespace().any(|word| {
        let takes_argument = before.len() == 2 && before.starts_with('-') && before != "-c";
        before = word;
        !(word.contains('=') || word.starts_with('-') || takes_argument)
    })
}

const UNKNOWN: &str = "unknown option `";

/// What `postgres` says is wrong. It may quote the name of an option, and no value.
fn cause(error: &postgres::Error) -> String {
    error.source().map(ToString::to_string).unwrap_or_default()
}

fn unreadable(params: &str, cause: &str) -> String {
    let option = |text| cause.strip_prefix(text)?.strip_suffix('`');
    let is_other_url =
        !is_url(params) && params.split('=').next().is_some_and(|it| it.contains("://"));
    match (option(UNKNOWN), option("invalid value for option `")) {
        _ if is_other_url => {
            "a URL begins with postgres:// or postgresql://; remove jdbc:".to_owned()
        }
        (Some(name), _) => unknown(params, name),
        (_, None) => format!("invalid connection string; {}", form(params)),
        (_, Some("host" | "hostaddr" | "port")) => {
            format!("invalid connection string: invalid host or port; {}", form(params))
        }
        (_, Some(name)) => {
            let values = advice(name).unwrap_or("use a whole number");
            format!("invalid value for option \"{name}\"; {values}")
        }
    }
}

fn unknown(params: &str, name: &str) -> String {
    let lower = name.to_ascii_lowercase();
    let is_word = name.bytes().all(|byte| byte.is_ascii_alphabetic() || b"_-.".contains(&byte));
    let parsed = format!("{lower}=''").parse::<Config>();
    let is_known = !parsed.is_err_and(|error| cause(&error).starts_with(UNKNOWN));
    let is_list = params.split(' ').next().is_some_and(|word| word.contains(';'));
    let what_to_do = match advice(&lower) {
        _ if is_word && is_list && params.starts_with(name) => PAIRS,
        Some(advice) => advice,
        None if is_word && is_known => "write its name in lower case",
        None if is_word && is_away_from_passwords(params, name) => "remove it",
        None => {
            let hidden = "an unknown option, not named because that may be a piece of the password";
            return format!("invalid connection string: {hidden}; {}", form(params));
        }
    };
    format!("unknown option \"{name}\"; {what_to_do}")
}

/// Whether a name stands behind the login of a URL, and before any option that is a password.
fn is_away_from_passwords(params: &str, name: &str) -> bool {
    let options = if is_url(params) { params.rsplit('@').next() } else { Some(params) };
    let before = options.and_then(|options| options.rsplit_once(name));
    before.is_some_and(|(before, _)| !holds_secret(before))
}

/// What to do about an option of libpq's or another driver's, or about an invalid value of one.
fn advice(option: &str) -> Option<&'static str> {
    Some(match option {
        "sslmode" => {
            "use disable, prefer or require; to verify the server's certificate, use require and give \
             `connect_tls` a connector that verifies it"
        }
        "sslnegotiation" => "use postgres or direct",
        "target_session_attrs" => "use any, read-write or read-only",
        "channel_binding" => "use disable, prefer or require",
        "load_balance_hosts" => "use disable or random",
        "sslrootcert" | "sslcert" | "sslkey" | "sslpassword" | "sslcrl" | "sslcrldir" => {
            "configure the TLS connector that you give to `connect_tls`"
        }
        "ssl" | "requiressl" => "use sslmode=require, and `connect_tls`",
        "service" => "write the parameters out, because no service file is read",
        "passfile" => "write the password out, because no password file is read",
        "schema" | "currentschema" => "use builder().schema(..)",
        "search_path" => "use builder().schema(..), or options='-c search_path=..'",
        "statement_timeout" => "use options='-c statement_timeout=..'",
        "lock_timeout" => "use options='-c lock_timeout=..'",
        "connection_limit" | "pool_size" | "pool_max_conns" => "use builder().max_connections(..)",
        "pool_timeout" => "use builder().connection_timeout(..)",
        "prepared_statements" => "use builder().prepared_statements(..)",
        "client_encoding" => "remove it, because it is always UTF-8",
        "fallback_application_name" | "applicationname" => "use application_name",
        "server" => "use host",
        "username" | "uid" => "use user",
        "pwd" | "pass" | "passwd" => "use password",
        "database" | "db" => "use dbname",
        "timeout" | "connecttimeout" => "use connect_timeout",
        "targetservertype" => "use target_session_attrs",
        "gssencmode" | "krbsrvname" | "pgbouncer" | "pooling" => "remove it",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::{Index, select};

    use super::*;

    const MARK: &str = "hUnT3rzw0";

    fn told(params: &str) -> String {
        let refusal = parse(params).expect_err(params);
        refusal.source().expect("a cause").to_string()
    }

    #[test]
    fn what_is_wrong_comes_first_and_then_what_to_do() {
        const UNNAMED: &str = "invalid connection string: an unknown option, not named because";
        for (params, begins) in [
            ("postgres://u:p@h/d?pgbouncer=true", "unknown option \"pgbouncer\"; remove it"),
            ("postgres://u:p@h/d?currentSchema=a", "unknown option \"currentSchema\"; use builder"),
            ("postgres://u@h?sslMode=require", "unknown option \"sslMode\"; use disable, prefer"),
            ("host=h Port=1", "unknown option \"Port\"; write its name in lower case"),
            ("host=h a_b=on user=u password=p", "unknown option \"a_b\"; remove it"),
            ("password='p' sslrootcert=/ca.pem", "unknown option \"sslrootcert\"; configure the"),
            ("Host=h;Port=1;Username=u", "unknown option \"Host\"; write host=.. port=.. user=.."),
            ("pgbouncer=on user=u password='a;b'", "unknown option \"pgbouncer\"; remove it"),
            ("host=h password=correct horse=on", UNNAMED),
            ("postgres://u@h?password=a&horse=b", UNNAMED),
            ("postgres://u:a@b?horse=c@h", UNNAMED),
            ("postgres://u:p@h?sslmode=verify-full", "invalid value for option \"sslmode\"; use d"),
            (
                "options='-c statement_timeout=9' sslmode=allow",
                "invalid value for option \"sslmode",
            ),
            (
                "host=h connect_timeout=3s",
                "invalid value for option \"connect_timeout\"; use a who",
            ),
            (
                "host=h port=5432;user=u",
                "invalid connection string: invalid host or port; write ho",
            ),
            ("postgres://u@server:p@h/d", "invalid connection string: invalid host or port; write"),
            ("host=h user=a b", "invalid connection string; write host=.. port=.. user=.."),
            ("jdbc:postgresql://h/d?user=u", "a URL begins with postgres://"),
            ("postgresql+asyncpg://u:p@h/d", "a URL begins with postgres://"),
        ] {
            let told = told(params);
            assert!(told.starts_with(begins), "{params}: {told}");
            assert!(!told.contains("horse") && !told.contains("statement_timeout"), "{told}");
            assert_eq!(told.contains("percent"), told.contains("write postgres://"), "{told}");
        }
    }

    #[test]
    fn whatever_can_be_read_is_tried() {
        for params in [
            "  host=localhost\n user=app password='a ;=@ b' dbname=app\n",
            "host='/var/run/postgresql,/tmp/a=b; c' user=a.b-c_d$",
            "host=one.example,::1,fe80::1%eth0,münchen.example port=1,2,3,4 user=jürgen dbname=データ",
            "postgres://localhost/app",
            "postgres:///app?host=/var/run/postgresql&user=app@server",
            "postgres://%2Frun%2Fpostgresql,one:1,[::1]:2/app",
            "postgres://app:p%40%2F%3Bss@[::1]:5432/app?sslmode=require",
            "postgres://app%40server:p@h/d?options=endpoint%3Dep-cool-name-123456\n",
            "postgres://app.abcdefghij:p@h/d?options=reference%3Dabcdefghij",
            "host=h user=service@project.iam options='project=ep-cool-name'",
            "host=h user='DOMAIN\\\\someone#ext?' dbname='R&D'",
            "host=h user='pass through' dbname='a,b/c;d=e?f'",
            "host=h user='cn=app,ou=people' dbname=password",
            "host=h options='-c password_encryption=md5 -c app.bypass=on'",
            "host=h options='-c search_path=a,b\n --work_mem=64kB -cjit=off -S 64 -fs -e'",
            "host=h options='-c default_transaction_isolation=repeatable\\\\ read'",
        ] {
            assert!(parse(params).is_ok(), "{params}: {}", told(params));
        }
    }

    #[test]
    fn what_looks_like_a_password_and_would_be_repeated_is_refused() {
        for params in [
            "host=h dbname=app;password=hunter",
            "host=h user='app PASSWORD = hunter'",
            "host=h user=app,pwd=hunter",
            "host=h user=app&pass=hunter",
            "host=h user=apppassword=hunter",
            "host=h dbname=token=hunter",
            "host=h dbname=app%3Bpasswd%3Dhunter",
            "host=h dbname=postgres://app:hunter@h/app",
            "host=/tmp;password=hunter",
            "host=h options='-c jit=off client_secret=hunter'",
            "host=h options='-c jit=off hunter'",
            "postgres://u:p@h/d\nhunter",
        ] {
            assert!(!told(params).contains("hunter"), "{params}: {}", told(params));
        }
    }

    /// Valid parameters, with the password in them.
    fn valid() -> impl Strategy<Value = String> {
        let passwords = ["", "-x", ".y!", "$9"].map(|end| format!("{MARK}{end}"));
        let form = |password: String| {
            select(vec![
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
        select(passwords.to_vec()).prop_flat_map(form)
    }

    /// One thing is wrong: a character too many, another, none, no end, two swapped, others throughout.
    fn damaged() -> impl Strategy<Value = String> {
        let odd = || select(" ;,@=&?/:'\"\\#%\n\t.x-".chars().collect::<Vec<_>>());
        (valid(), 0..6, any::<Index>(), odd(), odd()).prop_map(|(params, kind, at, from, to)| {
            let mut chars: Vec<char> = params.chars().collect();
            let at = at.index(chars.len() - 1);
            match kind {
                0 => chars.insert(at, to),
                1 => chars[at] = to,
                2 => drop(chars.remove(at)),
                3 => chars.truncate(at),
                4 => chars.swap(at, at + 1),
                _ => chars.iter_mut().filter(|c| **c == from).for_each(|c| *c = to),
            }
            chars.into_iter().collect()
        })
    }

    /// Any five characters of the mark in a row.
    fn shows(text: &str) -> bool {
        (0..=MARK.len() - 5).any(|at| text.contains(&MARK[at..at + 5]))
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20_000) })]

        /// Two things that are wrong may well make other valid parameters, whose host is the password.
        /// What is refused is not repeated, and what is read has no password in what the server or
        /// the error repeats; but for the user's name in a URL, which may have taken in a part of the
        /// password when the colon between them went elsewhere: nothing tells it from a long name.
        #[test]
        fn no_piece_of_a_password_comes_out(params in damaged()) {
            match parse(&params) {
                Err(error) => {
                    let source = error.source().expect("a cause");
                    let shown = format!("{error} {error:?} {error:#?} {source} {source:?}");
                    prop_assert!(!shows(&shown), "{params:?}: {shown}");
                }
                Ok(config) => {
                    let user = config.get_user().filter(|_| !params.starts_with("postgres"));
                    let repeated = [user, config.get_dbname(), config.get_options()];
                    let repeated = format!("{:?} {repeated:?}", config.get_hosts());
                    prop_assert!(!shows(&repeated), "{params:?}: {repeated}");
                }
            }
        }
    }
}
