"""A plugin of Datasette, in its --plugins-dir: loads the extension before a database is opened, and
writes as a plugin does. Datasette's pages read on connections of their own, with mode=ro."""

import sqlite3

from datasette import hookimpl

loader = sqlite3.connect(":memory:")
loader.enable_load_extension(True)
loader.load_extension("./libdurovfs")


@hookimpl
def startup(datasette):
    async def write_and_read():
        app = datasette.get_database("app")
        await app.execute_write("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")
        for number in range(1, 11):
            await app.execute_write("INSERT INTO notes (text) VALUES (?)", ["note %d" % number])
        print((await app.execute("SELECT count(*) FROM notes")).single_value())
        for sql in ("SELECT durovfs_status()", "SELECT durovfs_bookmark()"):
            print(await app.execute_write_fn(lambda db, sql=sql: db.execute(sql).fetchone()[0]))

    return write_and_read
