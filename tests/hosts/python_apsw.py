"""apsw, which brings a SQLite of its own, linked into it and hidden."""

import apsw

loader = apsw.Connection(":memory:")
loader.enable_load_extension(True)
loader.load_extension("./libdurovfs")

app = apsw.Connection("app.db")
app.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")
for number in range(1, 11):
    app.execute("INSERT INTO notes (text) VALUES (?)", ["note %d" % number])

again = apsw.Connection("app.db")
for sql in ("SELECT count(*) FROM notes", "SELECT durovfs_status()", "SELECT durovfs_bookmark()"):
    print(again.execute(sql).fetchone()[0])
