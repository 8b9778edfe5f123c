//! Registering again, after the host shut SQLite down. Alone in its program: it takes SQLite away
//! from everybody else in the process.

#![allow(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod common;

use common::*;

/// Broken, an application that shuts SQLite down and loads the extension again is not protected.
#[test]
fn a_shutdown_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = open_wal(&path);
    exec(&db, "CREATE TABLE t(a)");
    drop(db);
    // SAFETY: no connection is open.
    assert_eq!(unsafe { libsqlite3_sys::sqlite3_shutdown() }, 0);
    // SAFETY: as any program does.
    assert_eq!(unsafe { libsqlite3_sys::sqlite3_initialize() }, 0);
    register(sink()).unwrap();
    register(sink()).unwrap();
    let db = open(&path);
    exec(&db, "INSERT INTO t VALUES (1)");
    drop(db);
    assert_eq!(sink().last_lsn(path.to_str().unwrap()), 3);
    assert_level(&path);
}

/// Broken, the shim calls some other function of the host than it means to.
#[test]
fn slots_stand_where_the_header_has_them() {
    let home = std::env::var("CARGO_HOME")
        .map(std::path::PathBuf::from)
        .unwrap_or_else(|_| {
            std::path::PathBuf::from(std::env::var("HOME").unwrap()).join(".cargo")
        });
    let mut headers = Vec::new();
    for registry in std::fs::read_dir(home.join("registry/src")).unwrap() {
        for package in std::fs::read_dir(registry.unwrap().path()).unwrap() {
            let package = package.unwrap().path();
            let name = package.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with("libsqlite3-sys-") {
                headers.push(package.join("sqlite3/sqlite3ext.h"));
            }
        }
    }
    assert!(
        !headers.is_empty(),
        "the header of libsqlite3-sys is not in the cargo registry"
    );
    for header in headers {
        let text = std::fs::read_to_string(&header).unwrap();
        let body = text.split("struct sqlite3_api_routines {").nth(1).unwrap();
        let body = body.split("\n};").next().unwrap();
        let code: String = body
            .split("/*")
            .map(|part| part.split("*/").last().unwrap())
            .collect();
        let names: Vec<&str> = code.split(';').filter_map(slot_name).collect();
        for (name, index) in durovfs_vfs::ffi::SLOTS {
            assert_eq!(names.get(*index), Some(name), "{}", header.display());
        }
    }
}

/// The name in `type (*name)(arguments)`.
fn slot_name(declaration: &str) -> Option<&str> {
    let rest = declaration.split_once('(')?.1;
    let rest = rest
        .trim_start_matches("SQLITE_CDECL")
        .trim_start_matches([' ', '*']);
    rest.split(')').next().map(str::trim)
}
