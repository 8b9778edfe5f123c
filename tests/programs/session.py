"""Executes SQL that it is told, one JSON object per line, and tells what became of it.

{"open": PATH, "extension": FILE or absent}   opens the one database of this process
{"sql": TEXT}                                 executes it, in autocommit mode
{"close": true}                               closes the database and ends

Each answer is one line: {"rows": [...], "us": N} or {"error": TEXT, "code": N, "us": N}.
"""

import json
import sqlite3
import sys
import time


def open_database(request):
    if "extension" in request:
        loader = sqlite3.connect(":memory:")
        loader.enable_load_extension(True)
        loader.load_extension(request["extension"])
    database = sqlite3.connect(request["open"], isolation_level=None, timeout=30, uri=True)
    # Python opens lazily enough that only this finds a database that cannot be opened.
    database.execute("PRAGMA schema_version").fetchall()
    return database


def plain(value):
    return value.hex() if isinstance(value, bytes) else value


def main():
    database = None
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter_ns()
        try:
            rows = []
            if "open" in request:
                database = open_database(request)
            elif "close" in request:
                database.close()
            else:
                rows = [[plain(value) for value in row] for row in database.execute(request["sql"])]
            answer = {"rows": rows}
        except sqlite3.Error as error:
            answer = {"error": str(error), "code": getattr(error, "sqlite_errorcode", 0)}
        answer["us"] = (time.perf_counter_ns() - begin) // 1000
        print(json.dumps(answer), flush=True)
        if "close" in request:
            break


main()
