//! Whatever a schema and a table are called, a scanner of SQL finds just these names in each
//! statement, where the file has its own, and everything else as it was; and a literal is one value.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::keywords::Keyword;
use sqlparser::tokenizer::{Token, Tokenizer, Word};

/// The module under test is not public, and takes these two from its crate's root.
#[derive(Debug)]
#[expect(dead_code, reason = "it is only made")]
enum Error {
    InvalidIdentifier { identifier: String, reason: &'static str },
}
type Result<T> = std::result::Result<T, Error>;

#[expect(dead_code, reason = "not all of it puts a name into SQL")]
#[path = "../../src/pg/identifier.rs"]
mod identifier;
use identifier::{Table, literal};

const SCHEMA_FILE: &str = include_str!("../../sql/create_schema.sql");
const TABLE_FILES: [&str; 21] = [
    include_str!("../../sql/absent.sql"),
    include_str!("../../sql/advance.sql"),
    include_str!("../../sql/advance_or_find.sql"),
    include_str!("../../sql/all.sql"),
    include_str!("../../sql/create_table.sql"),
    include_str!("../../sql/create_updated_at_index.sql"),
    include_str!("../../sql/delete.sql"),
    include_str!("../../sql/delete_again.sql"),
    include_str!("../../sql/find.sql"),
    include_str!("../../sql/lock.sql"),
    include_str!("../../sql/lock_absent.sql"),
    include_str!("../../sql/lock_new.sql"),
    include_str!("../../sql/project_check.sql"),
    include_str!("../../sql/project_create.sql"),
    include_str!("../../sql/project_save.sql"),
    include_str!("../../sql/save.sql"),
    include_str!("../../sql/save_again.sql"),
    include_str!("../../sql/save_many.sql"),
    include_str!("../../sql/try_lock.sql"),
    include_str!("../../sql/try_lock_absent.sql"),
    include_str!("../../sql/write_together.sql"),
];

static SCHEMA_TOKENS: LazyLock<Vec<Token>> = LazyLock::new(|| scan(SCHEMA_FILE));
static TABLE_TOKENS: LazyLock<Vec<Vec<Token>>> =
    LazyLock::new(|| TABLE_FILES.iter().map(|file| scan(file)).collect());

fn scan(sql: &str) -> Vec<Token> {
    Tokenizer::new(&PostgreSqlDialect {}, sql).tokenize().expect("a statement")
}

fn quoted(name: &str) -> Token {
    let keyword = Keyword::NoKeyword;
    Token::Word(Word { value: name.to_owned(), quote_style: Some('"'), keyword })
}

/// The tokens of a file with other names in place of its own.
fn renamed(file: &[Token], schema: &str, table: &str) -> Vec<Token> {
    let name = |token: &Token| match token {
        Token::Word(Word { value, quote_style: None, .. }) if value == "public" => quoted(schema),
        Token::Word(Word { value, quote_style: None, .. }) if value == "projection_checkpoints" => {
            quoted(table)
        }
        other => other.clone(),
    };
    file.iter().map(name).collect()
}

fn is_good(name: &str) -> bool {
    (1..=63).contains(&name.len()) && !name.contains('\0')
}

/// The one value that a literal means.
fn value(literal: &str) -> Vec<u8> {
    assert!(literal.is_ascii());
    let tokens = scan(literal);
    if let [Token::EscapedStringLiteral(text)] = &tokens[..] {
        return text.clone().into_bytes();
    }
    let strings: Vec<_> = tokens
        .iter()
        .filter_map(|token| match token {
            Token::SingleQuotedString(text) => Some(text.as_str()),
            _ => None,
        })
        .collect();
    let [hex, "hex", "UTF8"] = strings[..] else { panic!("{tokens:?}") };
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("two digits");
    (0..hex.len()).step_by(2).map(byte).collect()
}

fuzz_target!(|names: (&str, &str)| {
    let (schema, table) = names;
    for text in [schema, table] {
        assert_eq!(value(&literal(text)), text.as_bytes());
    }
    let Ok(rendered) = Table::new(schema, table) else {
        assert!(!is_good(schema) || !is_good(table), "refused without a reason");
        return;
    };
    assert!(is_good(schema) && is_good(table), "PostgreSQL would refuse it, or cut it short");

    let as_rendered = scan(&rendered.render_schema(SCHEMA_FILE));
    assert_eq!(as_rendered, renamed(&SCHEMA_TOKENS, schema, table));
    for (file, tokens) in TABLE_FILES.iter().zip(&*TABLE_TOKENS) {
        assert_eq!(scan(&rendered.render(file)), renamed(tokens, schema, table));
    }
});
