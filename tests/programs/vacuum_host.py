"""A program that copies its database with VACUUM INTO, and goes on.

usage: vacuum_host.py EXTENSION DATABASE apsw|sqlite3
"""

import sys


def connect(extension, path, driver):
    if driver == "apsw":
        import apsw

        loader, database = apsw.Connection(":memory:"), lambda: apsw.Connection(path)
    else:
        import sqlite3

        loader = sqlite3.connect(":memory:")
        database = lambda: sqlite3.connect(path, isolation_level=None)
    loader.enable_load_extension(True)
    loader.load_extension(extension)
    return database()


def main():
    extension, path, driver = sys.argv[1:4]
    database = connect(extension, path, driver)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE t (x)")
    database.execute("INSERT INTO t VALUES (1)")
    # As text, and as a parameter.
    database.execute("VACUUM INTO '%s-copy'" % path)
    database.execute("VACUUM main INTO ?", (path + "-copy-2",))
    database.execute("ATTACH '%s-attached' AS a" % path)
    database.execute("CREATE TABLE a.t (x)")
    database.execute("INSERT INTO t VALUES (2)")
    database.close()


main()
