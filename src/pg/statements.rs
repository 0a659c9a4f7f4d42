//! The SQL of `sql/`, with the name of the store's table in it.

use postgres::types::Type;

use super::identifier::Table;
use super::session::Query;

/// What stands for the offset in the files of the statements that cannot bind it.
const OFFSET: &str = "42";

/// A field for each file, with the types of the parameters; and for each file that cannot bind its
/// parameter, the pieces between which the offset stands.
macro_rules! statements {
    (bound { $($name:ident($($type:ident),*),)* } in_pieces { $($pieces:ident,)* }) => {
        #[derive(Debug)]
        pub(crate) struct Statements {
            $(pub(crate) $name: Query,)*
            $(pub(crate) $pieces: Vec<String>,)*
        }

        impl Statements {
            pub(crate) fn new(table: &Table) -> Self {
                Self {
                    $($name: Query {
                        sql: table.render(file!($name)),
                        parameters: &[$(Type::$type),*],
                    },)*
                    $($pieces: file!($pieces).split(OFFSET).map(|it| table.render(it)).collect(),)*
                }
            }

            #[cfg(test)]
            fn with_their_files(&self) -> Vec<(String, &'static str)> {
                vec![
                    $((self.$name.sql.clone(), file!($name)),)*
                    $((self.$pieces.join(OFFSET), file!($pieces)),)*
                ]
            }
        }
    };
}

macro_rules! file {
    ($name:ident) => {
        include_str!(concat!("../../sql/", stringify!($name), ".sql"))
    };
}

statements! {
    bound {
        find(TEXT),
        all(),
        absent(TEXT, TEXT),
        save(TEXT, INT8),
        save_again(TEXT_ARRAY, INT8_ARRAY, TIMESTAMPTZ),
        save_many(TEXT_ARRAY, INT8_ARRAY),
        advance(TEXT, INT8, INT8),
        advance_or_find(TEXT, INT8, INT8),
        write_together(TEXT_ARRAY, INT8_ARRAY, INT8_ARRAY),
        delete(TEXT),
        delete_again(TEXT, TIMESTAMPTZ),
        server_time(),
        may_discard(TEXT),
        lock(TEXT),
        lock_new(TEXT, TEXT),
        try_lock(TEXT),
        project_lock(TEXT),
        project_try_lock(TEXT),
        lock_absent(TEXT, TEXT),
        try_lock_absent(TEXT, TEXT),
    }
    in_pieces {
        project_save,
        project_create,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rendered_statement_differs_from_its_file_in_nothing_but_the_tables_name()
    -> crate::Result<()> {
        let statements = Statements::new(&Table::new("app \"one\" 42", "Check;points")?);
        for (sql, file) in statements.with_their_files() {
            let name = "\"app \"\"one\"\" 42\".\"Check;points\"";
            assert_eq!(sql.replace(name, "public.projection_checkpoints"), file);
        }
        Ok(())
    }
}
