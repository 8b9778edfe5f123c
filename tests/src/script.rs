//! Random SQL scripts over everything that SQLite allows in a database file, for the comparison of
//! durovfs with plain SQLite. The same seed gives the same script; no statement depends on time or
//! chance.

use crate::seed::Seeded;
use serde_json::{Value, json};

/// Statements after the schema.
const LENGTH: std::ops::Range<u64> = 15..60;
const PAGE_SIZES: [u32; 8] = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];
const JOURNALS: [&str; 6] = ["WAL", "WAL", "DELETE", "TRUNCATE", "PERSIST", "MEMORY"];

/// One script, as `programs/script_host.py` takes it. Its databases are `main.db` and `other.db`.
pub fn script(seeded: &mut Seeded) -> Vec<Value> {
    let mut maker = Maker {
        seeded,
        steps: Vec::new(),
        files: 0,
    };
    maker.begin();
    let length = maker.between(LENGTH);
    for _ in 0..length {
        maker.step();
    }
    maker.end();
    maker.steps
}

struct Maker<'a> {
    seeded: &'a mut Seeded,
    steps: Vec<Value>,
    /// Files made by VACUUM INTO and backups.
    files: u32,
}

impl Maker<'_> {
    fn below(&mut self, end: u64) -> u64 {
        self.seeded.below(end)
    }

    fn between(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.below(range.end - range.start)
    }

    fn one_in(&mut self, end: u64) -> bool {
        self.below(end) == 0
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    fn sql(&mut self, connection: &str, sql: impl Into<String>) {
        self.steps.push(json!(["sql", connection, sql.into()]));
    }

    /// A text of up to some kilobytes, now and then of hundreds.
    fn text(&mut self) -> String {
        let length = match self.below(20) {
            0 => self.below(200_000),
            1..=5 => self.below(6000),
            _ => self.below(200),
        };
        let letter = char::from(b'a' + self.below(26) as u8);
        format!("printf('%.*c', {length}, '{letter}')")
    }

    fn begin(&mut self) {
        self.steps.push(json!(["open", "a", "file:main.db"]));
        if self.one_in(2) {
            let size = self.pick(&PAGE_SIZES);
            self.sql("a", format!("PRAGMA page_size={size}"));
        }
        let auto_vacuum = self.below(3);
        self.sql("a", format!("PRAGMA auto_vacuum={auto_vacuum}"));
        if self.one_in(6) {
            let encoding = self.pick(&["UTF-16le", "UTF-16be"]);
            self.sql("a", format!("PRAGMA encoding='{encoding}'"));
        }
        self.settings("a");
        let journal = self.pick(&JOURNALS);
        self.sql("a", format!("PRAGMA journal_mode={journal}"));
        self.sql("a", "PRAGMA foreign_keys=ON");
        for sql in SCHEMA {
            if !self.one_in(12) {
                self.sql("a", *sql);
            }
        }
        self.steps.push(json!(["open", "b", "file:main.db"]));
        self.settings("b");
    }

    fn settings(&mut self, connection: &str) {
        let cache = self.pick(&[3, 10, 100, -2000]);
        self.sql(connection, format!("PRAGMA cache_size={cache}"));
        let synchronous = self.below(4);
        self.sql(connection, format!("PRAGMA synchronous={synchronous}"));
        let pages = self.pick(&[0, 5, 50, 1000]);
        self.sql(connection, format!("PRAGMA wal_autocheckpoint={pages}"));
        if self.one_in(4) {
            let limit = self.pick(&[-1, 0, 20_000]);
            self.sql(connection, format!("PRAGMA journal_size_limit={limit}"));
        }
        if self.one_in(4) {
            let bytes = self.pick(&[0, 100_000, 10_000_000]);
            self.sql(connection, format!("PRAGMA mmap_size={bytes}"));
        }
        if self.one_in(6) {
            self.sql(connection, "PRAGMA secure_delete=ON");
        }
        if self.one_in(8) {
            self.sql(connection, "PRAGMA locking_mode=EXCLUSIVE");
        }
    }

    fn end(&mut self) {
        for connection in ["a", "b"] {
            self.sql(connection, "ROLLBACK");
        }
        for sql in ["PRAGMA integrity_check", "PRAGMA journal_mode"] {
            self.sql("a", sql);
        }
        for table in ["t", "w", "child", "notes", "j", "r", "e"] {
            self.sql("a", format!("SELECT * FROM {table}"));
        }
    }

    fn step(&mut self) {
        let connection = if self.one_in(5) { "b" } else { "a" };
        match self.below(100) {
            0..=49 => self.change(connection),
            50..=61 => self.transaction(connection),
            62..=69 => self.upkeep(connection),
            70..=75 => self.mode(connection),
            76..=81 => self.schema(connection),
            82..=87 => self.attached(connection),
            88..=92 => self.error(connection),
            93..=95 => self.copies(connection),
            _ => self.reopen(connection),
        }
    }

    fn change(&mut self, connection: &str) {
        let id = self.below(60);
        let text = self.text();
        let sql = match self.below(22) {
            0..=3 => format!("INSERT INTO t(a, b) VALUES ({text}, x'00ff')"),
            4 => format!("INSERT OR REPLACE INTO t(id, a) VALUES ({id}, {text})"),
            5 => format!(
                "WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) \
                 INSERT INTO t(a, b) SELECT 'row ' || i, zeroblob(i) FROM n",
                5 + self.below(150)
            ),
            6 | 7 => format!("UPDATE t SET a = {text} WHERE id % 7 = {}", id % 7),
            8 => format!("UPDATE t SET b = zeroblob({})", self.below(900)),
            9 | 10 => format!("DELETE FROM t WHERE id % 5 = {}", id % 5),
            11 => format!("INSERT INTO w VALUES ('key {id}', {text})"),
            12 => format!(
                "INSERT INTO w VALUES ('key {id}', 'new') ON CONFLICT(k) DO UPDATE \
                 SET v = v || excluded.v"
            ),
            13 => format!("INSERT INTO parent VALUES ({id})"),
            14 => format!("INSERT INTO child(p, x) VALUES ({id}, {text})"),
            15 => format!("DELETE FROM parent WHERE id = {id}"),
            16 => format!(
                "INSERT INTO notes(body) VALUES ('alpha beta {id} ' || substr({text}, 1, 3000))"
            ),
            17 => format!("DELETE FROM notes WHERE rowid % 3 = {}", id % 3),
            18 => format!("INSERT INTO r VALUES ({id}, {id}, {}, 1.5, 2.5)", id + 3),
            19 => format!("INSERT INTO j VALUES (json_object('id', {id}, 'x', json('[1,2]')))"),
            20 => format!("UPDATE j SET doc = json_set(doc, '$.x[0]', {id}) WHERE rowid < 9"),
            _ => format!("INSERT INTO tt VALUES ({id}, {text})"),
        };
        let returning = if sql.starts_with("INSERT INTO t(") && self.one_in(3) {
            " RETURNING id, g"
        } else {
            ""
        };
        self.sql(connection, format!("{sql}{returning}"));
    }

    fn transaction(&mut self, connection: &str) {
        let sql = match self.below(14) {
            0..=2 => "BEGIN",
            3 => "BEGIN IMMEDIATE",
            4 => "BEGIN EXCLUSIVE",
            5..=7 => "COMMIT",
            8 => "ROLLBACK",
            9 => "SAVEPOINT one",
            10 => "SAVEPOINT two",
            11 => "ROLLBACK TO one",
            12 => "RELEASE one",
            _ => "ROLLBACK TO two",
        };
        self.sql(connection, sql);
    }

    fn upkeep(&mut self, connection: &str) {
        let checkpoint = self.pick(&["PASSIVE", "FULL", "RESTART", "TRUNCATE"]);
        let sql = match self.below(10) {
            0..=3 => format!("PRAGMA wal_checkpoint({checkpoint})"),
            4 | 5 => "VACUUM".to_owned(),
            6 => format!("PRAGMA incremental_vacuum({})", self.below(20)),
            7 => "REINDEX".to_owned(),
            8 => "ANALYZE".to_owned(),
            _ => "INSERT INTO notes(notes) VALUES ('optimize')".to_owned(),
        };
        self.sql(connection, sql);
    }

    fn mode(&mut self, connection: &str) {
        let journal = self.pick(&JOURNALS);
        let (size, auto_vacuum) = (self.pick(&PAGE_SIZES), self.below(3));
        match self.below(7) {
            0..=2 => self.sql(connection, format!("PRAGMA journal_mode={journal}")),
            3 => self.sql(connection, "PRAGMA locking_mode=NORMAL"),
            4 => self.sql(connection, "PRAGMA locking_mode=EXCLUSIVE"),
            5 => {
                self.sql(connection, format!("PRAGMA page_size={size}"));
                self.sql(connection, "VACUUM");
            }
            _ => {
                self.sql(connection, format!("PRAGMA auto_vacuum={auto_vacuum}"));
                self.sql(connection, "VACUUM");
            }
        }
    }

    fn schema(&mut self, connection: &str) {
        let n = self.below(4);
        let sql = match self.below(9) {
            0 => format!("CREATE TABLE extra_{n} AS SELECT id, a FROM t LIMIT 20"),
            1 => format!("DROP TABLE extra_{n}"),
            2 => format!("CREATE INDEX IF NOT EXISTS t_{n} ON t(b, a) WHERE id > {n}"),
            3 => format!("DROP INDEX t_{n}"),
            4 => format!("ALTER TABLE t ADD COLUMN c{n} DEFAULT 'added'"),
            5 => format!("ALTER TABLE extra_{n} RENAME TO extra_{}", (n + 1) % 4),
            6 => format!("CREATE TEMP TABLE tt{n} AS SELECT * FROM w"),
            7 => format!("PRAGMA user_version={n}"),
            _ => format!("CREATE VIEW view_{n} AS SELECT count(*) FROM t"),
        };
        self.sql(connection, sql);
    }

    fn attached(&mut self, connection: &str) {
        let text = self.text();
        let journal = self.pick(&JOURNALS);
        let sql = match self.below(9) {
            0..=2 => "ATTACH 'other.db' AS o".to_owned(),
            3 => "CREATE TABLE o.e(id INTEGER PRIMARY KEY, a)".to_owned(),
            4 => format!("INSERT INTO e(a) VALUES ({text})"),
            5 => "INSERT INTO e(a) SELECT a FROM t LIMIT 30".to_owned(),
            6 => format!("PRAGMA o.journal_mode={journal}"),
            7 => "DELETE FROM e WHERE id % 2".to_owned(),
            _ => "DETACH o".to_owned(),
        };
        self.sql(connection, sql);
    }

    fn error(&mut self, connection: &str) {
        let sql = match self.below(12) {
            0 => "INSERT INTO t(id, a) SELECT id, a FROM t".to_owned(),
            1 => "INSERT OR FAIL INTO t(id, a) VALUES (900, 'x'), (900, 'y')".to_owned(),
            2 => "INSERT OR ROLLBACK INTO w VALUES ('key 1', 1), ('key 1', 2)".to_owned(),
            3 => "INSERT INTO j VALUES ('not json')".to_owned(),
            4 => "INSERT INTO child(p) VALUES (100000)".to_owned(),
            5 => "UPDATE t SET a = NULL".to_owned(),
            6 => "INSERT INTO nowhere VALUES (1)".to_owned(),
            7 => "SELEKT 1".to_owned(),
            8 => format!("PRAGMA query_only={}", self.below(2)),
            9 => format!("PRAGMA max_page_count={}", self.pick(&[1, 60, 1_000_000])),
            10 => "INSERT INTO r VALUES (1, 9, 3, 0, 0)".to_owned(),
            _ => "SELECT raise_it(1)".to_owned(),
        };
        self.sql(connection, sql);
    }

    fn copies(&mut self, connection: &str) {
        self.files += 1;
        let file = format!("copy-{}.db", self.files);
        let row = self.below(20);
        match self.below(5) {
            0 => self.sql(connection, format!("VACUUM INTO '{file}'")),
            1 => self.steps.push(json!(["backup", connection, file])),
            2 => self
                .steps
                .push(json!(["backup_from", connection, "copy-1.db"])),
            _ => {
                let step = json!(["blob", connection, "t", "b", row, 1, "abcd"]);
                self.steps.push(step);
            }
        }
    }

    fn reopen(&mut self, connection: &str) {
        let uri = self.pick(&["file:main.db", "file:main.db", "file:main.db?mode=ro"]);
        self.steps.push(json!(["close", connection]));
        self.steps.push(json!(["open", connection, uri]));
        self.settings(connection);
        if self.one_in(2) {
            self.sql(connection, "CREATE TEMP TABLE IF NOT EXISTS tt(id, x)");
        }
    }
}

const SCHEMA: &[&str] = &[
    "CREATE TABLE t(id INTEGER PRIMARY KEY, a TEXT NOT NULL, b BLOB, \
     g AS (length(a)) STORED, v AS (id * 2))",
    "CREATE INDEX t_a ON t(a)",
    "CREATE TABLE w(k TEXT PRIMARY KEY, v) WITHOUT ROWID",
    "CREATE TABLE parent(id INTEGER PRIMARY KEY)",
    "CREATE TABLE child(id INTEGER PRIMARY KEY AUTOINCREMENT, \
     p REFERENCES parent(id) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED, x)",
    "CREATE VIRTUAL TABLE notes USING fts5(body)",
    "CREATE VIRTUAL TABLE r USING rtree(id, x0, x1, y0, y1)",
    "CREATE TABLE j(doc TEXT CHECK (json_valid(doc)))",
    "CREATE TABLE log(what, id)",
    "CREATE TRIGGER t_insert AFTER INSERT ON t BEGIN INSERT INTO log VALUES ('new', new.id); END",
    "CREATE TRIGGER t_delete BEFORE DELETE ON t WHEN old.id % 2 \
     BEGIN DELETE FROM log WHERE id = old.id; END",
    "CREATE TEMP TABLE tt(id, x)",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_script() {
        // Broken: a difference that was found could not be replayed.
        let made = |seed| script(&mut Seeded::new(seed));
        assert_eq!(made(5), made(5));
        assert_ne!(made(5), made(6));
    }
}
