//! The tree keeps the shape that `docs/architecture.md` gives it. Each rule is a test of its own,
//! so that a failure says which one was broken, where.

use durovfs_tests::binaries::workspace;
use durovfs_tests::source::{blank_literals, functions, without_tests};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Folders with Rust code of ours.
const CRATES: [&str; 11] = [
    "wire",
    "quorum",
    "journal",
    "archive",
    "copies",
    "link",
    "vfs",
    "sqlite-ext",
    "sidecar",
    "tests",
    "bench",
];
/// A file is read as a whole; beyond this, it is two.
const MAX_FILE_LINES: usize = 800;
/// A function fits a screen.
const MAX_FUNCTION_LINES: usize = 70;
/// Width of a line, in characters.
const MAX_LINE_CHARACTERS: usize = 100;
/// Longer functions that are better whole: file, function, reason.
const LONG_FUNCTIONS: [(&str, &str, &str); 0] = [];
/// The only places that may hold unsafe code: the C boundary, the mask of signals of our thread
/// in somebody else's program, and a test's program that loads an extension.
const UNSAFE_PLACES: [&str; 6] = [
    "tests/hosts/rust.rs",
    "vfs/src/ffi.rs",
    "vfs/src/shim.rs",
    "vfs/src/shim/",
    "sqlite-ext/src/lib.rs",
    "sqlite-ext/src/signals.rs",
];

/// Which crate may import which; the table of the architecture page.
fn allowed_edges() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let all = [
        "wire", "quorum", "journal", "archive", "copies", "link", "vfs",
    ];
    let edges: [(&str, &[&str]); 9] = [
        ("wire", &[]),
        ("quorum", &["wire"]),
        ("journal", &["wire"]),
        ("archive", &["wire"]),
        ("copies", &["archive", "wire"]),
        ("link", &["wire"]),
        ("vfs", &["wire"]),
        ("sqlite-ext", &["vfs", "link", "wire"]),
        (
            "sidecar",
            &["quorum", "journal", "archive", "copies", "link", "wire"],
        ),
    ];
    let mut table: BTreeMap<_, BTreeSet<_>> = edges
        .into_iter()
        .map(|(from, to)| (from, to.iter().copied().collect()))
        .collect();
    for from in ["tests", "bench"] {
        table.insert(from, all.into_iter().collect());
    }
    // The simulator runs the sidecar's own binding of state machine and journal.
    table.entry("tests").or_default().insert("sidecar");
    table
}

struct SourceFile {
    name: String,
    text: String,
}

impl SourceFile {
    /// Whether the whole file is test code.
    fn is_test(&self) -> bool {
        self.name.ends_with("/tests.rs") || self.name.contains("/tests/")
    }
}

fn rust_files() -> Vec<SourceFile> {
    let mut files = Vec::new();
    for folder in CRATES {
        collect(&workspace().join(folder), &mut files);
    }
    assert!(files.len() > 20, "only {} files found", files.len());
    files
}

fn collect(folder: &Path, files: &mut Vec<SourceFile>) {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    for path in paths {
        if path.is_dir() && !path.ends_with("target") {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path
                .strip_prefix(workspace())
                .unwrap()
                .to_string_lossy()
                .into_owned();
            files.push(SourceFile {
                name,
                text: std::fs::read_to_string(&path).unwrap(),
            });
        }
    }
}

fn assert_none(rule: &str, offences: &[String]) {
    assert!(offences.is_empty(), "{rule}:\n  {}", offences.join("\n  "));
}

#[test]
fn crates_import_only_what_the_architecture_allows() {
    // Broken: the quorum's rules could come to depend on a clock or a socket, and could no longer
    // be tested without them.
    let metadata = cargo_metadata::MetadataCommand::new()
        .current_dir(workspace())
        .no_deps()
        .exec()
        .unwrap();
    let table = allowed_edges();
    let mut offences = Vec::new();
    let mut seen = 0;
    for package in &metadata.packages {
        let name = package
            .name
            .strip_prefix("durovfs-")
            .unwrap_or(&package.name);
        let allowed = table
            .get(name)
            .unwrap_or_else(|| panic!("crate {name} is not in the table"));
        seen += 1;
        for dependency in &package.dependencies {
            let Some(to) = dependency.name.strip_prefix("durovfs-") else {
                continue;
            };
            let normal = dependency.kind == cargo_metadata::DependencyKind::Normal;
            if normal && !allowed.contains(to) {
                offences.push(format!("{name} -> {to}"));
            }
        }
    }
    assert_eq!(seen, table.len());
    assert_none("edges that are not in the table", &offences);
}

#[test]
fn every_file_says_what_lives_in_it() {
    // Broken: a reader could not find where a thing belongs, and would put it anywhere.
    let silent = |file: &SourceFile| !file.text.starts_with("//! ");
    let offences: Vec<_> = rust_files()
        .into_iter()
        .filter(silent)
        .map(|file| file.name)
        .collect();
    assert_none("files that do not begin with `//! `", &offences);
}

#[test]
fn files_and_lines_are_short_enough_to_read() {
    // Broken: the one file that owns the state machine would grow past what anybody reviews.
    let mut offences = Vec::new();
    for file in rust_files() {
        let code = without_tests(&file.text).lines().count();
        if code > MAX_FILE_LINES && !file.is_test() {
            offences.push(format!("{}: {code} lines", file.name));
        }
        for (index, line) in file.text.lines().enumerate() {
            if line.chars().count() > MAX_LINE_CHARACTERS {
                offences.push(format!("{}:{}: a long line", file.name, index + 1));
            }
        }
    }
    assert_none("files over 800 lines, lines over 100 columns", &offences);
}

#[test]
fn functions_fit_a_screen() {
    // Broken: the rules that keep commits safe would be hidden in pages of branches.
    let mut offences = Vec::new();
    let mut excused = BTreeSet::new();
    for file in rust_files().into_iter().filter(|file| !file.is_test()) {
        for function in functions(&blank_literals(&without_tests(&file.text))) {
            if function.lines <= MAX_FUNCTION_LINES {
                continue;
            }
            let excuse = LONG_FUNCTIONS
                .iter()
                .position(|(name, long, _)| *name == file.name && *long == function.name);
            match excuse {
                Some(index) => drop(excused.insert(index)),
                None => offences.push(format!(
                    "{}:{}: {} has {} lines",
                    file.name, function.line, function.name, function.lines
                )),
            }
        }
    }
    assert_none("functions over 70 lines", &offences);
    assert_eq!(
        excused.len(),
        LONG_FUNCTIONS.len(),
        "an excuse is not needed any more"
    );
}

#[test]
fn nothing_unfinished_is_left_behind() {
    // Broken: a path that panics or prints to a terminal would ship inside other people's programs.
    // Spelled in two halves, so that this file does not find itself.
    let words = [
        ("FIX", "ME"),
        ("TO", "DO"),
        ("XX", "X"),
        ("dbg", "!("),
        ("todo", "!("),
        ("unimplemented", "!("),
        ("#[ign", "ore"),
    ];
    let mut offences = Vec::new();
    for file in rust_files() {
        for (index, line) in file.text.lines().enumerate() {
            if words
                .iter()
                .any(|(left, right)| line.contains(&format!("{left}{right}")))
            {
                offences.push(format!("{}:{}: {}", file.name, index + 1, line.trim()));
            }
        }
    }
    assert_none("unfinished", &offences);
}

#[test]
fn unsafe_code_stands_at_the_c_boundary_only() {
    // Broken: memory safety of the host would rest on code that nobody reviews for it.
    let mut offences = Vec::new();
    for file in rust_files() {
        let allowed = UNSAFE_PLACES
            .iter()
            .any(|place| file.name.starts_with(place));
        // Benchmarks are no part of what people load.
        if allowed || file.is_test() || file.name.starts_with("bench/") {
            continue;
        }
        for (index, line) in blank_literals(&file.text).lines().enumerate() {
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            if words.any(|word| word == "unsafe") {
                offences.push(format!("{}:{}: {}", file.name, index + 1, line.trim()));
            }
        }
    }
    assert_none("unsafe outside the C boundary", &offences);
}

#[test]
fn pages_for_people_name_no_path_of_one_machine() {
    // Broken: a newcomer would paste a line that works on the author's machine only.
    let mut pages = vec![
        workspace().join("README.md"),
        workspace().join("CHANGELOG.md"),
    ];
    let docs = std::fs::read_dir(workspace().join("docs")).unwrap();
    pages.extend(
        docs.map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file()),
    );
    let mut offences = Vec::new();
    for page in &pages {
        let text = std::fs::read_to_string(page).unwrap();
        for (index, line) in text.lines().enumerate() {
            if ["/work/", "/root/", "/home/", "target-"]
                .iter()
                .any(|path| line.contains(path))
            {
                offences.push(format!("{}:{}: {line}", page.display(), index + 1));
            }
        }
    }
    assert_none("paths of one machine", &offences);
}

#[test]
fn links_between_pages_lead_somewhere() {
    // Broken: the README would send its readers to pages that do not exist.
    let mut offences = Vec::new();
    let mut links = 0;
    let docs = std::fs::read_dir(workspace().join("docs")).unwrap();
    let mut pages: Vec<_> = docs.map(|entry| entry.unwrap().path()).collect();
    pages.push(workspace().join("README.md"));
    for page in pages.iter().filter(|page| page.is_file()) {
        let text = std::fs::read_to_string(page).unwrap();
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split([')', '#']).next())
        {
            if link.is_empty() || link.starts_with("http") {
                continue;
            }
            links += 1;
            if !page.parent().unwrap().join(link).exists() {
                offences.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(links > 5, "only {links} links found");
    assert_none("links to nothing", &offences);
}
