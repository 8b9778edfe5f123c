"""A program that shuts SQLite down and starts it again, which makes "unix" the default VFS: loads the
extension again, and is protected again. It calls the system's SQLite as a C program does.

usage: shutdown_host.py EXTENSION DATABASE
"""

import ctypes
import json
import sys

OK = 0
ROW = 100
ROUNDS = 3

sqlite = ctypes.CDLL("libsqlite3.so.0")
sqlite.sqlite3_column_text.restype = ctypes.c_char_p
sqlite.sqlite3_errmsg.restype = ctypes.c_char_p


class Database:
    def __init__(self, path):
        self.handle = ctypes.c_void_p()
        self.check(sqlite.sqlite3_open(path.encode(), ctypes.byref(self.handle)))

    def check(self, code):
        assert code == OK, sqlite.sqlite3_errmsg(self.handle).decode()

    def value(self, sql):
        statement = ctypes.c_void_p()
        self.check(
            sqlite.sqlite3_prepare_v2(self.handle, sql.encode(), -1, ctypes.byref(statement), None)
        )
        value = None
        while sqlite.sqlite3_step(statement) == ROW:
            value = sqlite.sqlite3_column_text(statement, 0)
        self.check(sqlite.sqlite3_finalize(statement))
        return value and value.decode()

    def close(self):
        self.check(sqlite.sqlite3_close(self.handle))


def load(extension):
    loader = Database(":memory:")
    loader.check(sqlite.sqlite3_enable_load_extension(loader.handle, 1))
    loader.check(sqlite.sqlite3_load_extension(loader.handle, extension.encode(), None, None))
    loader.close()


def is_protected(path):
    database = Database(path)
    status = database.value("SELECT durovfs_status()")
    database.close()
    return json.loads(status)["protected"]


def main():
    extension, path = sys.argv[1:3]
    load(extension)
    database = Database(path)
    database.value("PRAGMA journal_mode=WAL")
    database.value("CREATE TABLE t(a)")
    database.close()
    for number in range(ROUNDS):
        assert sqlite.sqlite3_shutdown() == OK
        if number % 2:
            assert sqlite.sqlite3_initialize() == OK
        # Not loaded again: opened as by a program without durovfs.
        database = Database(path)
        assert database.value("SELECT count(*) FROM pragma_function_list WHERE name = 'durovfs_status'") == "0"
        database.close()
        load(extension)
        load(extension)
        assert is_protected(path)
        database = Database(path)
        database.value("INSERT INTO t VALUES (%d)" % number)
        database.close()
    database = Database(path)
    assert database.value("SELECT count(*) FROM t") == str(ROUNDS)
    database.close()


main()
