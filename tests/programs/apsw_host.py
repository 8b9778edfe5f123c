"""A program whose SQLite is linked in and hidden (apsw): loads the extension, commits, reads back.

usage: apsw_host.py EXTENSION DATABASE
"""

import json
import sys

import apsw

ROWS = 100


def main():
    extension, path = sys.argv[1:3]
    loader = apsw.Connection(":memory:")
    loader.enable_load_extension(True)
    loader.load_extension(extension)
    database = apsw.Connection(path)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, x TEXT)")
    for n in range(ROWS):
        database.execute("INSERT INTO t VALUES (?, ?)", (n, "row %d" % n))
    status = json.loads(database.execute("SELECT durovfs_status()").fetchall()[0][0])
    assert status["protected"] is True, status
    assert status["sqlite_version"] == apsw.sqlitelibversion(), status
    # A backup is written page by page into another database, which is protected like any.
    copy = apsw.Connection(path + "-copy.db")
    with copy.backup("main", database, "main") as backup:
        backup.step()
    assert copy.execute("SELECT count(*) FROM t").fetchall()[0][0] == ROWS
    # An incremental blob writes into a row without a statement.
    database.execute("UPDATE t SET x = zeroblob(5) WHERE n = 1")
    with database.blob_open("main", "t", "x", 1, True) as blob:
        blob.write(b"hello")
    assert database.execute("SELECT x FROM t WHERE n = 1").fetchall()[0][0] == b"hello"
    copy.close()
    database.close()


main()
