//! Rust with rusqlite, on the SQLite that `libsqlite3-sys` brings: the newest one here.

use rusqlite::{Connection, LoadExtensionGuard, Result};

fn main() -> Result<()> {
    let loader = Connection::open_in_memory()?;
    // SAFETY: the library is an extension of SQLite.
    unsafe {
        let _guard = LoadExtensionGuard::new(&loader)?;
        loader.load_extension("./libdurovfs", None::<&str>)?;
    }

    let app = Connection::open("app.db")?;
    app.execute_batch("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")?;
    for number in 1..=10 {
        app.execute(
            "INSERT INTO notes (text) VALUES (?)",
            [format!("note {number}")],
        )?;
    }

    let again = Connection::open("app.db")?;
    for sql in [
        "SELECT CAST(count(*) AS TEXT) FROM notes",
        "SELECT durovfs_status()",
        "SELECT durovfs_bookmark()",
    ] {
        println!(
            "{}",
            again.query_row(sql, [], |row| row.get::<_, String>(0))?
        );
    }
    Ok(())
}
