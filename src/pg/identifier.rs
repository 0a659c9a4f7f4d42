//! Names and values in the text of a statement.

use std::fmt;
use std::time::SystemTime;

use crate::{Error, Result};

/// PostgreSQL cuts longer identifiers short, with no more than a notice.
const MAX_IDENTIFIER_BYTES: usize = 63;

/// A checked identifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identifier(String);

impl Identifier {
    pub(crate) fn new(identifier: &str) -> Result<Self> {
        let reason = if identifier.is_empty() {
            "it is empty"
        } else if identifier.len() > MAX_IDENTIFIER_BYTES {
            "it is longer than 63 bytes, and PostgreSQL would cut it short"
        } else if identifier.contains('\0') {
            "it contains a NUL character"
        } else {
            return Ok(Self(identifier.to_owned()));
        };
        Err(Error::InvalidIdentifier { identifier: identifier.to_owned(), reason })
    }
}

/// As it is written in SQL.
impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.replace('"', "\"\""))
    }
}

/// Where the checkpoints live, and the one place that puts a name into SQL.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    schema: Identifier,
    table: Identifier,
}

impl Table {
    pub(crate) const DEFAULT_SCHEMA: &str = "public";
    pub(crate) const DEFAULT_TABLE: &str = "projection_checkpoints";
    /// How the files in `sql/` call it.
    const IN_FILES: &str = "public.projection_checkpoints";

    pub(crate) fn new(schema: &str, table: &str) -> Result<Self> {
        Ok(Self { schema: Identifier::new(schema)?, table: Identifier::new(table)? })
    }

    pub(crate) fn render(&self, sql: &str) -> String {
        sql.replace(Self::IN_FILES, &self.to_string())
    }

    /// For the one statement that names the schema alone.
    pub(crate) fn render_schema(&self, sql: &str) -> String {
        sql.replace(Self::DEFAULT_SCHEMA, &self.schema.to_string())
    }

    /// The schema's and the table's own name, for where a name is a value.
    pub(crate) fn names(&self) -> [&str; 2] {
        [&self.schema.0, &self.table.0]
    }

    pub(crate) fn schema(&self) -> &Identifier {
        &self.schema
    }
}

impl Default for Table {
    fn default() -> Self {
        Self {
            schema: Identifier(Self::DEFAULT_SCHEMA.to_owned()),
            table: Identifier(Self::DEFAULT_TABLE.to_owned()),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.table)
    }
}

/// An expression for a text, in ASCII, so that it means the same whatever the encoding of the client is, and
/// the server's settings for string constants.
pub(crate) fn literal(text: &str) -> String {
    if text.is_ascii() {
        return format!("E'{}'", text.replace('\\', r"\\").replace('\'', "''"));
    }
    let hex: Vec<_> = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("pg_catalog.convert_from(pg_catalog.decode('{}', 'hex'), 'UTF8')", hex.concat())
}

/// An expression for a time, to the microsecond, that means the same whatever the server's settings are.
pub(crate) fn time_literal(time: SystemTime) -> String {
    const SECONDS_A_DAY: u64 = 86_400;
    const JULIAN_DAY_OF_1970: u64 = 2_440_588;
    let time = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (day, second) = (time.as_secs() / SECONDS_A_DAY, time.as_secs() % SECONDS_A_DAY);
    let (hour, minute) = (second / 3_600, second / 60 % 60);
    let (day, second, micros) = (JULIAN_DAY_OF_1970 + day, second % 60, time.subsec_micros());
    format!("'J{day} {hour:02}:{minute:02}:{second:02}.{micros:06}+00'")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads one quoted identifier as the server's scanner does: from a quote to the next one that
    /// is not doubled, and a doubled one stands for itself. Nothing else means anything in there.
    fn scan(sql: &str) -> Option<(String, &str)> {
        let mut identifier = String::new();
        let mut rest = sql.strip_prefix('"')?;
        loop {
            let (before, after) = rest.split_once('"')?;
            identifier.push_str(before);
            match after.strip_prefix('"') {
                Some(after_both) => {
                    identifier.push('"');
                    rest = after_both;
                }
                None => return Some((identifier, after)),
            }
        }
    }

    fn hostile() -> impl Strategy<Value = String> {
        let tricky = [
            "\"",
            "\"\"",
            "'",
            ".",
            ";",
            "--",
            "/*",
            "\\",
            "$$",
            "\n",
            "\0",
            "a",
            "public",
            "public.projection_checkpoints",
        ];
        let part = prop_oneof![
            4 => prop::sample::select(tricky.to_vec()).prop_map(ToOwned::to_owned),
            1 => any::<char>().prop_map(String::from),
        ];
        prop::collection::vec(part, 0..8).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 5_000,
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn whatever_is_quoted_is_read_back_and_ends_where_it_ends(
            schema in hostile(),
            table in hostile(),
            behind in hostile(),
        ) {
            let Ok(rendered) = Table::new(&schema, &table) else {
                let bad = |name: &str| !(1..=63).contains(&name.len()) || name.contains('\0');
                prop_assert!(bad(&schema) || bad(&table));
                return Ok(());
            };
            let behind = behind.replace("public", "");
            let sql = rendered.render(&format!("FROM public.projection_checkpoints {behind}"));
            let quoted = sql.strip_prefix("FROM ").ok_or_else(|| TestCaseError::fail("FROM"))?;
            let read = scan(quoted).and_then(|(first, rest)| {
                let (second, rest) = scan(rest.strip_prefix('.')?)?;
                Some((first, second, rest.to_owned()))
            });
            prop_assert_eq!(read, Some((schema, table, format!(" {behind}"))));
        }

        #[test]
        fn a_literal_is_read_back_and_ends_where_it_ends(text in hostile(), behind in hostile()) {
            let literal = literal(&text);
            prop_assert!(literal.is_ascii());
            let sql = format!("{literal} {behind}");
            let read = if text.is_ascii() { scan_literal(&sql) } else { scan_hex(&sql) };
            let behind = format!(" {behind}");
            prop_assert_eq!(read, Some((text, behind.as_str())));
        }
    }

    /// Reads one string constant with escapes as the server's scanner does, and what follows it.
    fn scan_literal(sql: &str) -> Option<(String, &str)> {
        let mut text = String::new();
        let mut rest = sql.strip_prefix("E'")?;
        loop {
            let (before, after) = rest.split_at(rest.find(['\'', '\\'])?);
            text.push_str(before);
            match after.get(..2) {
                Some(both @ ("''" | "\\\\")) => text.push_str(&both[1..]),
                _ => return after.strip_prefix('\'').map(|after| (text, after)),
            }
            rest = &after[2..];
        }
    }

    fn scan_hex(sql: &str) -> Option<(String, &str)> {
        let (hex, after) =
            sql.strip_prefix("pg_catalog.convert_from(pg_catalog.decode('")?.split_once('\'')?;
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).ok();
        let bytes = (0..hex.len()).step_by(2).map(byte).collect::<Option<_>>()?;
        Some((String::from_utf8(bytes).ok()?, after.strip_prefix(", 'hex'), 'UTF8')")?))
    }

    #[test]
    fn a_literal_is_ascii_in_every_encoding() {
        assert_eq!(literal(r"it's \"), r"E'it''s \\'");
        let hex = "pg_catalog.convert_from(pg_catalog.decode('c3bc', 'hex'), 'UTF8')";
        assert_eq!(literal("ü"), hex);
    }

    #[test]
    fn quotes_are_doubled_and_nothing_else_is_touched() -> Result<()> {
        assert_eq!(Identifier::new("Check\"points; --")?.to_string(), "\"Check\"\"points; --\"");
        Ok(())
    }

    #[test]
    fn what_postgres_would_cut_or_refuse_is_refused() {
        for bad in ["", "nul\0", &"x".repeat(64), &"ü".repeat(32)] {
            let refused = Identifier::new(bad);
            assert!(matches!(refused, Err(Error::InvalidIdentifier { .. })), "{bad:?}");
        }
        assert!(Identifier::new(&"x".repeat(63)).is_ok());
    }

    #[test]
    fn a_table_named_like_the_placeholder_is_rendered_once() -> Result<()> {
        let table = Table::new("s", "public.projection_checkpoints")?;
        let rendered = table.render("SELECT FROM public.projection_checkpoints");
        assert_eq!(rendered, "SELECT FROM \"s\".\"public.projection_checkpoints\"");
        Ok(())
    }

    #[test]
    fn a_time_is_a_julian_day_and_a_time_of_day_with_microseconds() {
        let time = |micros| SystemTime::UNIX_EPOCH + std::time::Duration::from_micros(micros);
        assert_eq!(time_literal(time(0)), "'J2440588 00:00:00.000000+00'");
        // 2026-11-28 23:59:59.000001
        assert_eq!(time_literal(time(1_795_910_399_000_001)), "'J2461373 23:59:59.000001+00'");
    }
}
