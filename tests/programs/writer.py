"""Commits rows one by one until it is killed, and tells what became of each.

usage: writer.py EXTENSION DATABASE WRITER FIRST COUNT TIMEOUT_MS PAUSE_MS

Row N of a writer is committed in one transaction with its count in the table "tally", so that half
a transaction would show. Lines: "try N" before, then "ok N", "no N CODE" (certainly not committed) or
"unknown N CODE"; "reopen CODE" when the database had to be opened again.
"""

import sqlite3
import sys
import time

IOERR_FSYNC = 1034
READONLY = 8
CANTOPEN = 14
REOPEN_PAUSE_S = 0.05


def say(*words):
    print(*words, flush=True)


def connect(path, timeout_ms):
    database = sqlite3.connect(path, isolation_level=None, timeout=30, uri=True)
    database.execute("PRAGMA durovfs_timeout=%d" % timeout_ms)
    database.execute("PRAGMA journal_mode=WAL")
    return database


def open_until_it_works(path, timeout_ms):
    while True:
        try:
            return connect(path, timeout_ms)
        except sqlite3.Error as error:
            say("reopen", getattr(error, "sqlite_errorcode", 0))
            time.sleep(REOPEN_PAUSE_S)


def payload(writer, n):
    # Mostly small rows, now and then one that takes several pages.
    size = 17 + (n * 7919 + writer) % 200 + (12000 if n % 23 == 0 else 0)
    return bytes((n + i) % 251 for i in range(size))


def commit(database, writer, n):
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO rows VALUES (?, ?, ?)", (writer, n, payload(writer, n)))
    database.execute("UPDATE tally SET n = n + 1 WHERE writer = ?", (writer,))
    database.execute("COMMIT")


def main():
    extension, path = sys.argv[1:3]
    writer, first, count, timeout_ms, pause_ms = (int(word) for word in sys.argv[3:8])
    loader = sqlite3.connect(":memory:")
    loader.enable_load_extension(True)
    loader.load_extension(extension)
    database = open_until_it_works(path, timeout_ms)
    say("open")
    for n in range(first, first + count):
        say("try", n)
        try:
            commit(database, writer, n)
            say("ok", n)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            say("unknown" if code == IOERR_FSYNC else "no", n, code)
            if code & 0xFF in (READONLY, CANTOPEN):
                database.close()
                database = open_until_it_works(path, timeout_ms)
            elif database.in_transaction:
                database.execute("ROLLBACK")
        if pause_ms:
            time.sleep(pause_ms / 1000)


main()
