"""A small shop, as an ordinary program: takes an order every few milliseconds until it is told to stop.

usage: demo_shop.py EXTENSION DATABASE

It knows nothing of durovfs but two lines: loading the extension, and how long a COMMIT may wait. It
prints one line per order: "taken N", or "refused N CODE TEXT" when COMMIT failed, or "unsure N ...";
after a refusal "orders N", what a read still sees.
"""

import sqlite3
import sys
import threading
import time

SQLITE_IOERR_FSYNC = 1034  # durovfs: outcome unknown
PAUSE_S = 0.002


def main():
    extension, path = sys.argv[1:3]
    loader = sqlite3.connect(":memory:")
    loader.enable_load_extension(True)
    loader.load_extension(extension)
    shop = sqlite3.connect(path, isolation_level=None, timeout=10)
    shop.execute("PRAGMA durovfs_timeout=3000")

    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    order = shop.execute("SELECT coalesce(max(id), 0) FROM orders").fetchone()[0]
    while not stop.is_set():
        order += 1
        try:
            shop.execute("BEGIN")
            shop.execute(
                "INSERT INTO orders VALUES (?, ?, ?)", (order, order % 3 + 1, order * 7 % 500)
            )
            shop.execute("COMMIT")
            print("taken", order, flush=True)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            verb = "unsure" if code == SQLITE_IOERR_FSYNC else "refused"
            print(verb, order, code, error, flush=True)
            if shop.in_transaction:
                shop.execute("ROLLBACK")
            seen = shop.execute("SELECT count(*) FROM orders").fetchone()[0]
            print("orders", seen, flush=True)
            time.sleep(0.2)
        time.sleep(PAUSE_S)
    shop.close()


main()
