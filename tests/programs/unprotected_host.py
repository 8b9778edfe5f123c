"""Opens databases in each way that leaves them unprotected, and prints what durovfs_status() says.

usage: unprotected_host.py EXTENSION   in a directory of its own, with a client configuration that
leaves out **/excluded.db; prints one JSON object, from the name of the case to the status
"""

import json
import sqlite3
import sys

import apsw


def connect(name):
    return sqlite3.connect(name, uri=True)


def status(database, *schema):
    sql = "SELECT durovfs_status(%s)" % ", ".join("?" * len(schema))
    return json.loads(database.execute(sql, schema).fetchone()[0])


def write(database):
    database.execute("CREATE TABLE t (n)")
    database.commit()
    return database


def main():
    extension = sys.argv[1]
    cases = {}
    early = write(connect("early.db"))
    early.execute("ATTACH 'attached-early.db' AS a")
    early.enable_load_extension(True)
    early.load_extension(extension)
    cases["opened early"] = status(early)
    cases["attached early"] = status(early, "a")

    app = write(connect("app.db"))
    cases["protected"] = status(app)
    app.execute("ATTACH 'second.db' AS s")
    app.execute("CREATE TABLE s.t (n)")
    cases["attached"] = status(app, "s")
    cases["all attached are protected"] = status(app)
    app.execute("ATTACH 'file:third.db?vfs=unix' AS o")
    cases["attached with another VFS"] = status(app, "o")
    cases["one attached is not protected"] = status(app)
    cases["no such schema"] = status(app, "nosuch")
    app.execute("CREATE TEMP TABLE scratch (n)")
    cases["temp"] = status(app, "temp")

    cases["in memory"] = status(connect(":memory:"))
    cases["temporary"] = status(connect(""))
    cases["excluded"] = status(write(connect("excluded.db")))
    cases["read-only"] = status(connect("file:app.db?mode=ro"))
    cases["immutable"] = status(connect("file:second.db?immutable=1"))
    cases["vfs=unix"] = status(write(connect("file:unix.db?vfs=unix")))

    # Python's module cannot name a VFS without a URI.
    loader = apsw.Connection(":memory:")
    loader.enable_load_extension(True)
    loader.load_extension(extension)
    named = apsw.Connection("named.db", vfs="unix")
    cases["another VFS by name"] = status(named)
    print(json.dumps(cases))


main()
