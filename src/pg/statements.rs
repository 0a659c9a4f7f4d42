//! The SQL of `sql/`, with the name of the store's table in it.

use postgres::types::Type;

use super::identifier::Table;
use super::session::{Query, Template};

/// A field for each file: with the types of the parameters, or for a statement that shares its message with
/// others, so that nothing can be bound.
macro_rules! statements {
    (bound { $($name:ident($($type:ident),*),)* } in_text { $($template:ident,)* }) => {
        #[derive(Debug)]
        pub(crate) struct Statements {
            $(pub(crate) $name: Query,)*
            $(pub(crate) $template: Template,)*
        }

        impl Statements {
            pub(crate) fn new(table: &Table) -> Self {
                Self {
                    $($name: Query {
                        sql: table.render(file!($name)),
                        parameters: &[$(Type::$type),*],
                    },)*
                    $($template: Template::new(file!($template), |sql| table.render(sql)),)*
                }
            }

            #[cfg(test)]
            fn with_their_files(&self) -> Vec<(String, &'static str)> {
                vec![
                    $((self.$name.sql.clone(), file!($name)),)*
                    $((self.$template.with(&["$1", "$2", "$3"].map(str::to_owned)), file!($template)),)*
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
        lock_absent(TEXT, TEXT),
        try_lock_absent(TEXT, TEXT),
    }
    in_text {
        project_save,
        project_create,
        project_check,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rendered_statement_differs_from_its_file_in_nothing_but_the_tables_name()
    -> crate::Result<()> {
        let statements = Statements::new(&Table::new("app \"one\" $1", "Check;points")?);
        for (sql, file) in statements.with_their_files() {
            let name = "\"app \"\"one\"\" $1\".\"Check;points\"";
            assert_eq!(sql.replace(name, "public.projection_checkpoints"), file);
        }
        Ok(())
    }
}
