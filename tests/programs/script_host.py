"""Executes whole scripts, one JSON object per line, each in a directory of its own.

{"extension": FILE}                        loads it, before any script
{"directory": DIR, "steps": [STEP, ...]}   executes the steps there and closes what is open

STEP is ["open", C, URI], ["close", C], ["sql", C, TEXT], ["blob", C, TABLE, COLUMN, ROW, OFFSET, HEX],
["backup", C, FILE] or ["backup_from", C, FILE]; C names a connection. Each answer is one line: the
list of what the steps gave, rows or [code, text]; where durovfs refused a commit [code, text, why].
"""

import hashlib
import json
import os
import sqlite3
import sys

# Longer results are told by their digest.
LONGEST_RESULT = 300
MOST_BACKUP_STEPS = 50


def plain(value):
    return "x'" + value.hex() + "'" if isinstance(value, bytes) else value


def told(rows):
    text = json.dumps([[plain(value) for value in row] for row in rows])
    if len(text) <= LONGEST_RESULT:
        return text
    return f"{len(rows)} rows, {hashlib.sha256(text.encode()).hexdigest()}"


def connect(uri):
    connection = sqlite3.connect(
        uri, isolation_level=None, timeout=0, uri=True, cached_statements=0
    )
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    return connection


def backup(source, target):
    """Python tries for ever while a side is locked; this does not."""
    calls = 0

    def give_up(status, remaining, total):
        nonlocal calls
        calls += 1
        if calls > MOST_BACKUP_STEPS:
            raise sqlite3.OperationalError(f"no end of the backup: {status}")

    source.backup(target, pages=100, progress=give_up, sleep=0.001)


def execute(connections, step):
    kind, name = step[:2]
    if kind == "open":
        connections[name] = connect(step[2])
        return "open"
    connection = connections.get(name)
    if connection is None:
        return "not open"
    if kind == "close":
        connections.pop(name).close()
        return "closed"
    if kind == "sql":
        return told(connection.execute(step[2]).fetchall())
    if kind == "blob":
        table, column, row, offset, data = step[2:]
        with connection.blobopen(table, column, row) as blob:
            blob.seek(offset)
            blob.write(bytes.fromhex(data))
        return "written"
    if kind == "backup":
        other = connect(step[2])
        try:
            backup(connection, other)
        finally:
            other.close()
        return "copied"
    if kind == "backup_from":
        other = connect(step[2])
        try:
            backup(other, connection)
        finally:
            other.close()
        return "copied"
    raise ValueError(kind)


def failure(connection, error, protected):
    code = getattr(error, "sqlite_errorcode", type(error).__name__)
    if not protected or code != sqlite3.SQLITE_IOERR_WRITE or connection is None:
        return [code, str(error)]
    schemas = [row[1] for row in connection.execute("PRAGMA database_list").fetchall()]
    why = [
        connection.execute("SELECT durovfs_status(?)", [schema]).fetchone()[0]
        for schema in schemas
    ]
    return [code, str(error), *(f"{sqlite3.sqlite_version}: {status}" for status in why)]


def run(steps, protected):
    connections = {}
    results = []
    for step in steps:
        try:
            results.append(execute(connections, step))
        except sqlite3.Error as error:
            results.append(failure(connections.get(step[1]), error, protected))
        except (ValueError, IndexError) as error:
            results.append([type(error).__name__, str(error)])
    for name in sorted(connections):
        connections[name].close()
    return results


def main():
    protected = False
    for line in sys.stdin:
        request = json.loads(line)
        if "extension" in request:
            loader = sqlite3.connect(":memory:")
            loader.enable_load_extension(True)
            loader.load_extension(request["extension"])
            protected = True
            print("[]", flush=True)
            continue
        os.chdir(request["directory"])
        print(json.dumps(run(request["steps"], protected)), flush=True)


main()
