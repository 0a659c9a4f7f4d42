//! Every file in `sql/` runs as it stands, in psql, on `public.projection_checkpoints`.

use std::fs;
use std::path::Path;

use checkpoint_store::PostgresCheckpointStore;

use crate::harness::{self, server_program};

/// The types and values to bind, for a file with parameters.
fn parameters(file: &str) -> (&'static str, &'static str) {
    match file {
        "find.sql" | "delete.sql" | "lock.sql" | "try_lock.sql" => ("(text)", "('it''s')"),
        "lock_new.sql" | "lock_absent.sql" | "try_lock_absent.sql" => {
            ("(text, text)", "('it''s', 'public.projection_checkpoints')")
        }
        "save.sql" | "project_check.sql" => ("(text, bigint)", "('it''s', 42)"),
        "project_save.sql" | "project_create.sql" => {
            ("(text, bigint, timestamptz)", "('it''s', 42, now())")
        }
        "advance.sql" | "advance_or_find.sql" => ("(text, bigint, bigint)", "('it''s', 0, 42)"),
        "save_many.sql" => ("(text[], bigint[])", "('{a, b}', '{1, 2}')"),
        "save_again.sql" => {
            ("(text[], bigint[], timestamptz)", "('{a, b}', '{1, 2}', '2000-01-01')")
        }
        "delete_again.sql" => ("(text, timestamptz)", "('it''s', '2000-01-01')"),
        "write_together.sql" => {
            ("(text[], bigint[], bigint[])", "('{a, b}', '{1, null}', '{2, 2}')")
        }
        "find_namesake.sql" => ("(text, text)", "('public', 'Projection_Checkpoints')"),
        "absent.sql" => ("(text, text)", "('public.projection_checkpoints', 'it''s')"),
        "inspect_table.sql" | "may_discard.sql" => ("(text)", "('public.projection_checkpoints')"),
        _ => ("", ""),
    }
}

#[test]
fn every_file_runs_as_it_stands_in_psql() {
    let database = harness::fresh_database();
    PostgresCheckpointStore::connect(&database).unwrap().migrate().unwrap();
    let mut tried = 0;
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/sql")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&path).unwrap();
        let (types, values) = parameters(&name);
        let script = if types.is_empty() {
            text
        } else {
            format!("PREPARE statement{types} AS {text} EXECUTE statement{values};")
        };
        // It divides by the number of rows that it finds.
        let saved = "INSERT INTO public.projection_checkpoints VALUES ('it''s', 42);";
        let before = if name == "project_check.sql" { saved } else { "" };
        let output = server_program("psql")
            .args([
                "-X",
                "-v",
                "ON_ERROR_STOP=1",
                "-c",
                &format!("BEGIN; {before} {script} ROLLBACK"),
                &database,
            ])
            .output()
            .expect("psql runs");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        tried += 1;
    }
    assert_eq!(tried, 26);
}

/// One piece of SQL: a name, with its quotes if it has some, an operator, or another character.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Name(String),
    Operator(String),
    Sign(char),
}

/// Without strings, numbers, parameters and comments, in which no name is looked up.
fn tokens(sql: &str) -> Vec<Token> {
    const OPERATORS: &str = "+-*/<>=~!@#%^&|?";
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let mut rest = sql;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '-' if rest.starts_with("--") => rest.find('\n').unwrap_or(rest.len()),
            '\'' => 2 + rest[1..].find('\'').expect("a string ends"),
            '"' => 2 + rest[1..].find('"').expect("a quoted name ends"),
            '$' | '0'..='9' => 1 + rest[1..].find(|c| !is_name(c)).unwrap_or(rest.len() - 1),
            _ if is_name(c) => rest.find(|c| !is_name(c)).unwrap_or(rest.len()),
            _ if OPERATORS.contains(c) => {
                rest.find(|c| !OPERATORS.contains(c)).unwrap_or(rest.len())
            }
            _ => c.len_utf8(),
        };
        let text = rest[..length].to_owned();
        match c {
            '"' => tokens.push(Token::Name(text)),
            '\'' | '$' | '0'..='9' => tokens.push(Token::Sign('0')), // a value
            '-' if text.starts_with("--") => {}
            _ if is_name(c) => tokens.push(Token::Name(text)),
            _ if OPERATORS.contains(c) => tokens.push(Token::Operator(text)),
            _ if c.is_whitespace() => {}
            _ => tokens.push(Token::Sign(c)),
        }
        rest = &rest[length..];
    }
    tokens
}

/// The functions, operators, types, collations and system tables that are looked up along the search path.
fn unqualified(sql: &str) -> Vec<String> {
    /// What stands before a parenthesis and is no function, or one of the grammar's own.
    const KEYWORDS: [&str; 21] = [
        "VALUES",
        "IN",
        "ANY",
        "ALL",
        "EXISTS",
        "AS",
        "FROM",
        "OPERATOR",
        "WITH",
        "CONFLICT",
        "COALESCE",
        "ARRAY",
        "AND",
        "OR",
        "NOT",
        "WHERE",
        "SELECT",
        "ON",
        "MATERIALIZED",
        "KEY",
        "NULLIF",
    ];
    let tokens = tokens(sql);
    let is_named = |i: usize, name: &str| matches!(tokens.get(i), Some(Token::Name(found)) if found.eq_ignore_ascii_case(name));
    let is_sign = |i: usize, sign| tokens.get(i) == Some(&Token::Sign(sign));
    // What stands before position i, if it is `pg_catalog.`.
    let is_qualified = |i: usize| i >= 2 && is_sign(i - 1, '.') && is_named(i - 2, "pg_catalog");
    let mut found = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let before = i.saturating_sub(1);
        match token {
            Token::Operator(operator) => {
                let is_assignment = operator == "="
                    && (0..i)
                        .rev()
                        .find(|&j| {
                            is_named(j, "SET") || is_named(j, "WHERE") || is_named(j, "SELECT")
                        })
                        .is_some_and(|j| is_named(j, "SET"))
                    && (is_named(i - 2, "SET") || is_sign(i - 2, ','));
                let is_parameter = is_named(before, "fillfactor");
                let is_every_row = operator == "*" && is_sign(before, '(') && is_sign(i + 1, ')');
                if !(is_assignment || is_parameter || is_every_row || is_qualified(i)) {
                    found.push(format!("operator {operator}"));
                }
            }
            Token::Name(name) => {
                // `public.projection_checkpoints (..)` and what `AS` names are no functions.
                let is_of_the_grammar = KEYWORDS.contains(&name.to_uppercase().as_str());
                let is_alias = is_named(before, "AS") || is_named(before, "OF");
                let is_table = is_sign(before, '.') && is_named(i.saturating_sub(2), "public");
                let is_called =
                    is_sign(i + 1, '(') && [is_of_the_grammar, is_alias, is_table] == [false; 3];
                let is_type = is_sign(before, ':') && i >= 2 && is_sign(i - 2, ':');
                let is_collation = is_named(before, "COLLATE");
                // A type, and a collation, are given by their schema here.
                let is_schema = name == "pg_catalog";
                let is_system_table = name.starts_with("pg_")
                    && !is_schema
                    && (is_named(before, "FROM") || is_named(before, "JOIN"));
                let is_looked_up = is_called
                    || is_type && !is_schema
                    || is_collation && !is_schema
                    || is_system_table;
                if is_looked_up && !is_qualified(i) {
                    found.push(name.clone());
                }
            }
            Token::Sign(_) => {}
        }
    }
    found
}

/// The string literals of a Rust file that are SQL, up to its unit tests.
fn sql_in(source: &str) -> Vec<String> {
    const BEGINNINGS: [&str; 12] = [
        "SELECT ",
        "INSERT ",
        "UPDATE ",
        "DELETE ",
        "WITH ",
        "SAVEPOINT ",
        "ROLLBACK",
        "RELEASE ",
        "CREATE ",
        "SET ",
        "COMMIT",
        "BEGIN",
    ];
    let source = source.split("#[cfg(test)]\nmod tests").next().expect("a first piece");
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    let code = source.lines().filter(is_code).collect::<Vec<_>>().join("\n");
    let mut literals = Vec::new();
    let mut rest = code.as_str();
    while let Some(begin) = rest.find('"') {
        if rest[..begin].ends_with('\'') {
            rest = &rest[begin + 1..]; // the character
            continue;
        }
        let mut end = begin + 1;
        while !rest[end..].starts_with('"') {
            let c = rest[end..].chars().next().expect("a literal ends");
            end += c.len_utf8();
            if c == '\\' {
                end += rest[end..].chars().next().expect("a literal ends").len_utf8();
            }
        }
        literals.push(rest[begin + 1..end].replace("\\\"", "\"").replace("\\\n", ""));
        rest = &rest[end + 1..];
    }
    let is_sql = |text: &String| BEGINNINGS.iter().any(|it| text.trim_start().starts_with(it));
    literals.into_iter().filter(is_sql).collect()
}

#[test]
fn every_function_operator_and_type_is_qualified() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut statements = Vec::new();
    for entry in fs::read_dir(root.join("sql")).unwrap() {
        let path = entry.unwrap().path();
        statements.push((path.display().to_string(), fs::read_to_string(&path).unwrap()));
    }
    for entry in fs::read_dir(root.join("src/pg")).unwrap() {
        let path = entry.unwrap().path();
        let source = fs::read_to_string(&path).unwrap();
        statements.extend(sql_in(&source).into_iter().map(|sql| (path.display().to_string(), sql)));
    }
    assert!(statements.len() > 35, "{}: the statements in the code are found", statements.len());
    let faults: Vec<_> = statements
        .iter()
        .map(|(place, sql)| (place, unqualified(sql)))
        .filter(|(_, names)| !names.is_empty())
        .collect();
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn an_unqualified_name_is_found() {
    for (sql, expected) in [
        ("SELECT now()", "now"),
        ("SELECT pg_catalog.now() < $1", "operator <"),
        ("SELECT a FROM t WHERE a = 1", "operator ="),
        ("UPDATE t SET a = 1 WHERE b = 1", "operator ="),
        ("UPDATE t SET a = 1, b = c / 2", "operator /"),
        ("SELECT count(*) FROM t", "count"),
        ("SELECT $1::text", "text"),
        ("SELECT a COLLATE \"C\"", "\"C\""),
        ("SELECT * FROM pg_class", "pg_class"),
        ("SELECT 'a = b' || \"=\"", "operator ||"),
        ("SELECT a OPERATOR(public.=) 1", "operator ="),
    ] {
        let found = unqualified(sql);
        assert!(found.iter().any(|it| it == expected), "{sql}: {found:?}");
    }
    let fine = "UPDATE t SET a = $1, \"b\" = 'x = y' -- a = b
                WHERE a OPERATOR(pg_catalog.=) 1 AND x IN (SELECT pg_catalog.count(*)::pg_catalog.int4
                FROM pg_catalog.pg_class ORDER BY y COLLATE pg_catalog.\"C\")";
    assert_eq!(unqualified(fine), [""; 0]);
}
