"""A program that forks: parent and children commit to one database, each through its own connection.

usage: fork_host.py EXTENSION DATABASE
"""

import os
import sqlite3
import sys

ROWS = 50


def write(path, who):
    database = sqlite3.connect(path, isolation_level=None, timeout=30)
    for n in range(ROWS):
        database.execute("INSERT INTO t VALUES (?, ?)", (who, n))
    database.close()


def main():
    extension, path = sys.argv[1:3]
    loader = sqlite3.connect(":memory:")
    loader.enable_load_extension(True)
    loader.load_extension(extension)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE t (who TEXT, n INTEGER)")
    # SQLite's own handles must not be carried over a fork; the extension's client is.
    database.close()
    children = []
    for index in (1, 2):
        child = os.fork()
        if child == 0:
            write(path, "child-%d" % index)
            # Without the interpreter's end: nothing of the parent's may be cleaned up here.
            os._exit(0)
        children.append(child)
    write(path, "parent")
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0, status


main()
