//! What other code compiles against, as a text: a change of it is seen in review.

use std::collections::HashSet;
use std::fmt::Debug;
use std::fs;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::path::Path;

use checkpoint_store::postgres::error::SqlState;
use checkpoint_store::{
    CheckpointStore, Error, InTransaction, MemoryCheckpointStore, PostgresCheckpointStore,
};
use syn::{Attribute, Fields, ImplItem, Item, TraitItem, Type, Visibility, parse_quote};

use crate::harness::Schema;

const RECORD_VARIABLE: &str = "CHECKPOINT_STORE_RECORD_FACE";

#[test]
fn the_public_face_is_the_recorded_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut items = Vec::new();
    read(&root.join("src"), &mut items);
    let types: HashSet<String> = items.iter().filter_map(public_type).collect();
    let mut face: syn::File = parse_quote!();
    face.items = items.into_iter().filter_map(|item| declaration(item, &types)).collect();
    let found = prettyplease::unparse(&face);

    let recorded_at = root.join("tests/public-face.txt");
    if std::env::var_os(RECORD_VARIABLE).is_some() {
        fs::write(&recorded_at, &found).unwrap();
    }
    let recorded = fs::read_to_string(&recorded_at).unwrap_or_default();
    let change = found.lines().zip(recorded.lines()).find(|(found, recorded)| found != recorded);
    assert!(
        found == recorded,
        "the public face has changed: {change:?}; if that is meant, set {RECORD_VARIABLE} and run \
         this test again"
    );
}

/// Every item of every file, in the order of their names.
fn read(folder: &Path, items: &mut Vec<Item>) {
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            read(&path, items);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = fs::read_to_string(&path).unwrap();
            items.extend(syn::parse_file(&source).unwrap().items);
        }
    }
}

/// The lint `unreachable_pub` keeps `pub` from standing on anything that is not public.
fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn public_type(item: &Item) -> Option<String> {
    let (visibility, name) = match item {
        Item::Struct(item) => (&item.vis, &item.ident),
        Item::Enum(item) => (&item.vis, &item.ident),
        _ => return None,
    };
    is_public(visibility).then(|| name.to_string())
}

/// What a caller can rely on: no documentation, no bodies, no private parts.
fn declaration(item: Item, types: &HashSet<String>) -> Option<Item> {
    match item {
        Item::Struct(mut item) if is_public(&item.vis) => {
            visible(&mut item.attrs);
            if let Fields::Named(fields) = &mut item.fields {
                let all = std::mem::take(&mut fields.named);
                fields.named = all.into_iter().filter(|field| is_public(&field.vis)).collect();
                fields.named.iter_mut().for_each(|field| visible(&mut field.attrs));
            }
            Some(Item::Struct(item))
        }
        Item::Enum(mut item) if is_public(&item.vis) => {
            visible(&mut item.attrs);
            for variant in &mut item.variants {
                visible(&mut variant.attrs);
                variant.fields.iter_mut().for_each(|field| visible(&mut field.attrs));
            }
            Some(Item::Enum(item))
        }
        Item::Trait(mut item) if is_public(&item.vis) => {
            visible(&mut item.attrs);
            for method in &mut item.items {
                let TraitItem::Fn(method) = method else { continue };
                visible(&mut method.attrs);
                if method.default.is_some() {
                    method.default = Some(parse_quote!({}));
                }
            }
            Some(Item::Trait(item))
        }
        Item::Impl(mut item) if is_about(&item.self_ty, types) => {
            visible(&mut item.attrs);
            let own = item.trait_.is_none();
            item.items.retain_mut(|part| match part {
                ImplItem::Fn(method) if own && is_public(&method.vis) => {
                    visible(&mut method.attrs);
                    method.block = parse_quote!({});
                    true
                }
                _ => false,
            });
            (!own || !item.items.is_empty()).then_some(Item::Impl(item))
        }
        Item::Fn(mut item) if is_public(&item.vis) => {
            visible(&mut item.attrs);
            item.block = parse_quote!({});
            Some(Item::Fn(item))
        }
        Item::Type(mut item) if is_public(&item.vis) => {
            visible(&mut item.attrs);
            Some(Item::Type(item))
        }
        Item::Mod(item) if is_public(&item.vis) => Some(Item::Mod(item)),
        Item::Use(item) if is_public(&item.vis) => Some(Item::Use(item)),
        // Where a macro is used; `ident` is there where it is defined.
        Item::Macro(item) if item.ident.is_none() => Some(Item::Macro(item)),
        Item::Const(item) => {
            assert!(!is_public(&item.vis), "{}: say how to show a constant", item.ident);
            None
        }
        Item::Static(item) => {
            assert!(!is_public(&item.vis), "{}: say how to show a static", item.ident);
            None
        }
        Item::Struct(_)
        | Item::Enum(_)
        | Item::Trait(_)
        | Item::Impl(_)
        | Item::Fn(_)
        | Item::Type(_)
        | Item::Mod(_)
        | Item::Use(_)
        | Item::Macro(_) => None,
        _ => panic!("an item of a new kind: say whether it is public"),
    }
}

fn visible(attributes: &mut Vec<Attribute>) {
    let shown = ["derive", "non_exhaustive", "must_use", "cfg"];
    attributes.retain(|attribute| shown.iter().any(|name| attribute.path().is_ident(name)));
}

fn is_about(implementor: &Type, types: &HashSet<String>) -> bool {
    let Type::Path(path) = implementor else { return false };
    path.path.segments.last().is_some_and(|last| types.contains(&last.ident.to_string()))
}

#[test]
fn a_store_is_unwind_safe() {
    fn is_unwind_safe<T: UnwindSafe + RefUnwindSafe>() {}
    is_unwind_safe::<PostgresCheckpointStore>();
    is_unwind_safe::<MemoryCheckpointStore>();
}

#[test]
fn an_answer_that_says_whether_there_is_more_to_do_is_not_to_be_dropped() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut items = Vec::new();
    read(&root.join("src"), &mut items);
    let must_be_used = |name: &str| {
        items.iter().any(|item| {
            let (ident, attributes) = match item {
                Item::Struct(item) => (&item.ident, &item.attrs),
                Item::Enum(item) => (&item.ident, &item.attrs),
                _ => return false,
            };
            ident == name && attributes.iter().any(|it| it.path().is_ident("must_use"))
        })
    };
    for name in ["Batch", "InTransaction", "PostgresCheckpointStoreBuilder", "HealthCheck"] {
        assert!(must_be_used(name), "{name}");
    }
    assert!(!must_be_used("Retry"), "a type without it is found to be so");
}

#[test]
fn the_operations_in_a_transaction_can_be_shown_and_list_all_checkpoints() {
    fn is_debug<T: Debug>() {}
    is_debug::<InTransaction<'_, '_>>();
    let schema = Schema::new();
    schema.store.save("b", 2).unwrap();
    let mut client = schema.client();
    let mut tx = client.transaction().unwrap();
    let mut in_transaction = schema.store.in_transaction(&mut tx);
    assert!(format!("{in_transaction:?}").contains(&schema.name));
    in_transaction.save("a", 1).unwrap();
    let all: Vec<_> = in_transaction.all().unwrap().into_iter().map(|it| it.offset).collect();
    assert_eq!(all, [1, 2]);
    drop(tx);
    assert_eq!(schema.store.all().unwrap().len(), 1);
}

#[test]
fn a_custom_store_can_make_a_conflict_and_a_caller_can_ask_for_the_sql_state() {
    let conflict = Error::conflict("orders", 7, 9);
    assert!(conflict.is_conflict());
    assert!(
        matches!(&conflict, Error::Conflict { projection, expected: 7, found: 9, .. } if projection == "orders")
    );
    assert_eq!(conflict.sql_state(), None);

    let schema = Schema::new();
    schema.client().batch_execute("DROP TABLE projection_checkpoints").unwrap();
    let error = schema.store.save("orders", 1).unwrap_err();
    assert_eq!(error.sql_state(), Some(&SqlState::UNDEFINED_TABLE));
    let own = schema.client().batch_execute("SELECT 1 / 0").map_err(Error::from).unwrap_err();
    assert_eq!(own.sql_state(), Some(&SqlState::DIVISION_BY_ZERO));
    assert_eq!(Error::backend("save", std::io::Error::other("disk")).sql_state(), None);
}
