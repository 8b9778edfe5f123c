"""Python's own module, sqlite3."""

import sqlite3

loader = sqlite3.connect(":memory:")
loader.enable_load_extension(True)
loader.load_extension("./libdurovfs")

app = sqlite3.connect("app.db")
app.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")
for number in range(1, 11):
    app.execute("INSERT INTO notes (text) VALUES (?)", ["note %d" % number])
    app.commit()

again = sqlite3.connect("app.db")
for sql in ("SELECT count(*) FROM notes", "SELECT durovfs_status()", "SELECT durovfs_bookmark()"):
    print(again.execute(sql).fetchone()[0])
