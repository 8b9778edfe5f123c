"""One of several programs that write to one database in turns, whichever SQLite it has.

usage: alternate_host.py EXTENSION DATABASE WHO ROWS
"""

import sys


def connect_with_apsw(extension, path):
    import apsw

    loader = apsw.Connection(":memory:")
    loader.enable_load_extension(True)
    loader.load_extension(extension)
    database = apsw.Connection(path)
    database.set_busy_timeout(60000)
    return database


def connect_with_sqlite3(extension, path):
    import sqlite3

    loader = sqlite3.connect(":memory:")
    loader.enable_load_extension(True)
    loader.load_extension(extension)
    return sqlite3.connect(path, isolation_level=None, timeout=60)


def main():
    extension, path, who, rows = sys.argv[1:5]
    connect = connect_with_apsw if who.startswith("apsw") else connect_with_sqlite3
    database = connect(extension, path)
    database.execute("PRAGMA wal_autocheckpoint=10")
    for n in range(int(rows)):
        # What the others wrote last is read, and built upon.
        database.execute("BEGIN IMMEDIATE")
        database.execute(
            "INSERT INTO t SELECT ?, ?, coalesce(max(total), 0) + 1 FROM t", (who, n)
        )
        database.execute("COMMIT")
    database.close()


main()
