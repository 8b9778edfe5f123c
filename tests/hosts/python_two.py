"""Two SQLites in one process, Python's own and apsw's: each has loaded durovfs, and each has a
database of its own open while the other commits. The first one's answers are printed; the second
one's must be of the same kind."""

import json
import sqlite3

import apsw

loader = sqlite3.connect(":memory:")
loader.enable_load_extension(True)
loader.load_extension("./libdurovfs")
other_loader = apsw.Connection(":memory:")
other_loader.enable_load_extension(True)
other_loader.load_extension("./libdurovfs")

app = sqlite3.connect("app.db")
other = apsw.Connection("other.db")
for database in (app, other):
    database.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")
for number in range(1, 11):
    app.execute("INSERT INTO notes (text) VALUES (?)", ["note %d" % number])
    other.execute("INSERT INTO notes (text) VALUES (?)", ["note %d" % number])
    app.commit()

again = sqlite3.connect("app.db")
other_again = apsw.Connection("other.db")
assert other_again.execute("SELECT count(*) FROM notes").fetchone()[0] == 10
status = json.loads(other_again.execute("SELECT durovfs_status()").fetchone()[0])
assert status["protected"] is True, status
assert status["sqlite_version"] == apsw.sqlite_lib_version(), status
assert apsw.sqlite_lib_version() != sqlite3.sqlite_version, "this host has one SQLite only"
for sql in ("SELECT count(*) FROM notes", "SELECT durovfs_status()", "SELECT durovfs_bookmark()"):
    print(again.execute(sql).fetchone()[0])
