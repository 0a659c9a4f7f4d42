//! The front page and the guide as documents: short, without links that lead nowhere, nothing twice.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use checkpoint_store::PostgresCheckpointStore;

use crate::documentation::blocks;
use crate::harness;

const README: &str = include_str!("../../README.md");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn chapters() -> Vec<PathBuf> {
    let mut chapters: Vec<_> = fs::read_dir(root().join("src/guide"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    chapters.sort();
    chapters
}

/// All that is to be read in a repository's browser.
fn documents() -> Vec<PathBuf> {
    let others =
        ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benches/README.md"];
    others.iter().map(|name| root().join(name)).chain(chapters()).collect()
}

/// The lines that are not code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut is_code = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        is_code ^= fence;
        !is_code && !fence
    })
}

/// A heading's name in a link, as `GitHub` and rustdoc make it.
fn anchors(text: &str) -> Vec<String> {
    prose(text)
        .filter(|line| line.starts_with('#'))
        .map(|line| {
            let heading = line.trim_start_matches('#').trim().to_lowercase();
            let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

/// Where a document's links lead, those that are defined at its end too.
fn links(text: &str) -> Vec<String> {
    let mut links = Vec::new();
    for line in prose(text) {
        let inline = line.split("](").skip(1);
        links.extend(inline.map(|rest| rest.split(')').next().unwrap().to_owned()));
        links.extend(definition(line).map(|(_, target)| target.to_owned()));
    }
    links
}

/// `[label]: target`
fn definition(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix('[')?.split_once("]: ")
}

#[test]
fn the_front_page_is_short_and_hides_no_line_of_its_code() {
    assert!(README.lines().count() <= 200, "{} lines", README.lines().count());
    for language in ["rust", "rust,no_run"] {
        for block in blocks(README, language) {
            assert!(!block.lines().any(|line| line == "#" || line.starts_with("# ")), "{block}");
        }
    }
}

#[test]
fn every_link_leads_somewhere() {
    let elsewhere = ["https://keepachangelog.com/", "https://semver.org/"];
    let mut followed = 0;
    for path in documents() {
        for link in links(&read(&path)) {
            followed += 1;
            if link.contains("://") {
                assert!(elsewhere.iter().any(|site| link.starts_with(site)), "{link}");
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target =
                if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link}", path.display());
            let there = anchor.is_empty() || anchors(&read(&target)).iter().any(|it| it == anchor);
            assert!(there, "{}: {link}", path.display());
        }
    }
    assert!(followed >= 30, "{followed}");
}

/// In a chapter `[Recipes]` leads to a file, for those who browse the repository, and to a page of the
/// reference by an earlier definition. (That the page is there is for rustdoc to see.)
#[test]
fn a_chapters_links_lead_to_the_same_place_in_the_reference() {
    let in_the_reference: BTreeMap<String, String> = include_str!("../../src/guide/links.txt")
        .lines()
        .filter_map(definition)
        .map(|(label, target)| {
            let target = target.strip_prefix("self::").unwrap();
            let (chapter, anchor) = target.split_once('#').unwrap_or((target, ""));
            let hash = if anchor.is_empty() { "" } else { "#" };
            (label.to_owned(), format!("{chapter}.md{hash}{anchor}"))
        })
        .collect();
    for path in chapters() {
        let text = read(&path);
        let defined: BTreeMap<_, _> = text.lines().filter_map(definition).collect();
        for (label, target) in &defined {
            assert_eq!(in_the_reference.get(*label).map(String::as_str), Some(*target), "{label}");
        }
        for label in in_the_reference.keys() {
            let is_used = text.contains(&format!("[{label}]"));
            assert_eq!(
                is_used,
                defined.contains_key(label.as_str()),
                "{label} in {}",
                path.display()
            );
        }
    }
}

#[test]
fn every_file_that_is_named_is_there() {
    let folders = ["examples/", "tests/", "benches/", "sql/", "src/", "fuzz/", ".ci/"];
    let mut named = 0;
    for path in documents() {
        let text = read(&path);
        for line in prose(&text) {
            for name in line.split('`').skip(1).step_by(2) {
                if folders.iter().any(|folder| name.starts_with(folder)) && !name.contains(' ') {
                    named += 1;
                    assert!(root().join(name).exists(), "{}: {name}", path.display());
                }
            }
        }
    }
    assert!(named > 15, "{named}");
}

#[test]
fn nothing_stands_in_two_places() {
    const WORDS: usize = 13;
    let crate_page = include_str!("../../src/lib.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//!"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line))
        .collect::<Vec<_>>()
        .join("\n");
    let texts = documents()
        .into_iter()
        .map(|path| (path.display().to_string(), read(&path)))
        .chain([("src/lib.rs".to_owned(), crate_page)]);
    let mut seen: HashMap<String, String> = HashMap::new();
    for (document, text) in texts {
        let words: Vec<String> = prose(&text)
            .flat_map(str::split_whitespace)
            .map(|word| {
                word.chars().filter(|c| c.is_alphanumeric()).collect::<String>().to_lowercase()
            })
            .filter(|word| !word.is_empty())
            .collect();
        for passage in words.windows(WORDS).map(|words| words.join(" ")) {
            let first = seen.entry(passage.clone()).or_insert_with(|| document.clone());
            assert_eq!(*first, document, "{passage}");
        }
    }
}

#[test]
fn the_sql_of_the_guide_runs() {
    let mut tried = 0;
    for path in chapters() {
        let database = harness::fresh_database();
        PostgresCheckpointStore::connect(&database).unwrap().migrate().unwrap();
        let mut admin = harness::client(&database);
        admin
            .batch_execute(
                "DO $$ BEGIN CREATE ROLE monitor; EXCEPTION WHEN duplicate_object THEN END $$;
                 DO $$ BEGIN CREATE ROLE worker; EXCEPTION WHEN duplicate_object THEN END $$;
                 CREATE SCHEMA stream; CREATE TABLE stream.events (id bigint);
                 SET search_path TO public, stream",
            )
            .unwrap();
        for block in blocks(&read(&path), "sql") {
            admin
                .batch_execute(&block)
                .unwrap_or_else(|error| panic!("{}: {error}\n{block}", path.display()));
            tried += 1;
        }
    }
    assert_eq!(tried, 13);
}

/// The crates that a program gets with this one, by the features that it asks for.
#[test]
fn four_crates_come_with_it_and_one_without_features() {
    let names =
        |features: &[&str]| dependencies(&[&["--format={lib}", "--depth=1"], features].concat());
    let four = ["postgres", "r2d2", "r2d2_postgres", "thiserror"];
    assert_eq!(names(&[]), four);
    assert_eq!(names(&["--all-features"]), four);
    assert_eq!(names(&["--no-default-features"]), ["thiserror"]);
    assert_eq!(names(&["--no-default-features", "--features=conformance"]), ["thiserror"]);
}

#[cfg(target_os = "linux")]
#[test]
fn the_front_page_states_the_total_number_of_dependencies() {
    let all = dependencies(&["--format={p}"]).len(); // two versions of one crate are two
    assert!(README.contains(&format!("{all} in total on Linux")), "it is {all}");
}

fn dependencies(arguments: &[&str]) -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--edges=normal", "--prefix=none"])
        .arg("--manifest-path")
        .arg(root().join("Cargo.toml"))
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let mut names: Vec<_> =
        text.lines().skip(1).map(|line| line.trim_end_matches(" (*)").to_owned()).collect();
    names.sort();
    names.dedup();
    names
}
