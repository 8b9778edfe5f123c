"""A program that forks while a database is open. The child may not use the connection that it
inherits; the parent goes on, and finds its locks and its transaction as they were.

usage: inherit_host.py EXTENSION DATABASE JOURNAL_MODE
"""

import os
import sqlite3
import sys


def refused(database, sql):
    try:
        database.execute(sql).fetchall()
    except sqlite3.Error:
        return True
    return False


def child(inherited, path):
    """Exit status: which of the promises is broken; zero for none."""
    # In its own memory it may do what it likes.
    inherited.execute("INSERT INTO t VALUES ('inherited')")
    if not refused(inherited, "COMMIT"):
        return 1
    if not refused(inherited, "PRAGMA user_version=5"):
        return 2
    own = sqlite3.connect(path, isolation_level=None, timeout=0)
    if own.execute("SELECT count(*) FROM t").fetchone()[0] != 1:
        return 3
    # The parent has the write lock, and keeps it whatever is tried and closed here.
    if not refused(own, "INSERT INTO t VALUES ('child')"):
        return 4
    own.close()
    return 0


def main():
    extension, path, journal = sys.argv[1:4]
    loader = sqlite3.connect(":memory:")
    loader.enable_load_extension(True)
    loader.load_extension(extension)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=" + journal)
    database.execute("CREATE TABLE t (who TEXT)")
    database.execute("INSERT INTO t VALUES ('before')")
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO t VALUES ('parent')")
    pid = os.fork()
    if pid == 0:
        # Without the interpreter's end: nothing of the parent's may be cleaned up here.
        os._exit(child(database, path))
    _, status = os.waitpid(pid, 0)
    assert status == 0, os.waitstatus_to_exitcode(status)
    assert journal == "WAL" or os.path.exists(path + "-journal"), "the parent's journal is gone"
    other = sqlite3.connect(path, isolation_level=None, timeout=0)
    assert refused(other, "INSERT INTO t VALUES ('other')"), "the parent's lock is gone"
    other.close()
    database.execute("COMMIT")
    database.execute("INSERT INTO t VALUES ('after')")
    database.close()


main()
