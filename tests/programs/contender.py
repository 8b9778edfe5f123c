"""Moves money and appends to lists in transactions until it is killed, and tells all about each.

usage: contender.py EXTENSION DATABASE CLIENT FIRST TIMEOUT_MS PAUSE_MS

Each transaction of a client has a number N and, when it writes, takes the next version of the
database. One JSON object per line: {"try": N, "begin": T, "version": V, "balances": {...}, "lists":
{...}} with what it read, and "transfer": [FROM, TO, AMOUNT] or "append": [LIST, ITEM], before COMMIT;
then {"told": N, "end": T, "outcome": "ok" | "no" | "unknown", "code": CODE, "error": TEXT}. Times are microseconds
of the system's steady clock, which all programs share. A "try" without "version" has read nothing.
"""

import json
import random
import sqlite3
import sys
import time

IOERR_FSYNC = 1034
READONLY = 8
CANTOPEN = 14
REOPEN_PAUSE_S = 0.05
BUSY_TIMEOUT_S = 5
ACCOUNTS = 8
# Lists that are appended to at a time, and versions until others take their place, so that they
# stay short.
LISTS = 4
VERSIONS_PER_LISTS = 100


def say(**words):
    print(json.dumps(words), flush=True)


def now():
    return time.monotonic_ns() // 1000


def connect(path, timeout_ms):
    database = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S, uri=True)
    database.execute("PRAGMA durovfs_timeout=%d" % timeout_ms)
    database.execute("PRAGMA journal_mode=WAL")
    return database


def open_until_it_works(path, timeout_ms):
    while True:
        try:
            return connect(path, timeout_ms)
        except sqlite3.Error:
            time.sleep(REOPEN_PAUSE_S)


def read_balance(database, account):
    return database.execute("SELECT balance FROM accounts WHERE id = ?", (account,)).fetchone()[0]


def read_list(database, name):
    row = database.execute("SELECT items FROM lists WHERE name = ?", (name,)).fetchone()
    return [int(item) for item in row[0].split()] if row else []


def version_of(database):
    return database.execute("SELECT coalesce(max(version), 0) FROM entries").fetchone()[0]


def some_list(version, choice):
    return version // VERSIONS_PER_LISTS * LISTS + choice.randrange(LISTS)


def move_money(database, version, choice):
    source, target = choice.sample(range(ACCOUNTS), 2)
    balances = {account: read_balance(database, account) for account in (source, target)}
    amount = choice.randrange(1, 10)
    for account, change in ((source, -amount), (target, amount)):
        database.execute(
            "UPDATE accounts SET balance = ? WHERE id = ?", (balances[account] + change, account)
        )
    return {"balances": balances, "transfer": [source, target, amount]}


def append(database, version, choice, item):
    names = {some_list(version, choice), some_list(version, choice)}
    lists = {name: read_list(database, name) for name in names}
    name = min(names)
    items = " ".join(str(item) for item in lists[name] + [item])
    database.execute("INSERT OR REPLACE INTO lists VALUES (?, ?)", (name, items))
    return {"lists": lists, "append": [name, item]}


def audit(database, version, choice):
    name = some_list(version, choice)
    return {
        "balances": {account: read_balance(database, account) for account in range(ACCOUNTS)},
        "lists": {name: read_list(database, name)},
    }


def transact(database, client, n):
    """Executes the N-th transaction up to its COMMIT, and tells what it read and wrote."""
    choice = random.Random("%d-%d" % (client, n))
    kind = choice.choice(("move", "append", "append", "audit"))
    begin = now()
    told = {}
    try:
        database.execute("BEGIN" if kind == "audit" else "BEGIN IMMEDIATE")
        version = version_of(database)
        if kind == "audit":
            told = dict(audit(database, version, choice), version=version)
            return
        if kind == "move":
            told = move_money(database, version, choice)
        else:
            told = append(database, version, choice, client * 10**9 + n)
        database.execute("INSERT INTO entries VALUES (?, ?, ?)", (version + 1, client, n))
        told["version"] = version + 1
    finally:
        if "version" not in told:
            told = {}
        say(**{"try": n, "begin": begin}, **told)


def main():
    extension, path = sys.argv[1:3]
    client, first, timeout_ms, pause_ms = (int(word) for word in sys.argv[3:7])
    loader = sqlite3.connect(":memory:")
    loader.enable_load_extension(True)
    loader.load_extension(extension)
    database = open_until_it_works(path, timeout_ms)
    n = first
    while True:
        code, outcome, text = 0, "ok", ""
        try:
            transact(database, client, n)
            database.execute("COMMIT")
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            outcome = "unknown" if code == IOERR_FSYNC else "no"
            text = str(error)
        say(told=n, end=now(), outcome=outcome, code=code, error=text)
        if code & 0xFF in (READONLY, CANTOPEN):
            database.close()
            database = open_until_it_works(path, timeout_ms)
        elif database.in_transaction:
            database.execute("ROLLBACK")
        n += 1
        time.sleep(pause_ms / 1000)


main()
