"""Shows what durovfs does, on one machine, and checks every step: called by scripts/demo.

Needs DUROVFS_BIN and DUROVFS_EXTENSION. Everything happens in a directory that is deleted at the end.
"""

import collections
import datetime
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

DUROVFS = os.environ["DUROVFS_BIN"]
EXTENSION = os.environ["DUROVFS_EXTENSION"]
HERE = os.path.dirname(os.path.abspath(__file__))
# The codes that the README promises.
NOT_COMMITTED = 778
UNKNOWN = 1034
# Python before 3.11 does not tell the code.
UNTOLD = 0


class NotAsTold(Exception):
    """A step of the demo did not do what the demo says."""


def must(truth, what):
    if not truth:
        raise NotAsTold(what)


def step(text):
    step.number += 1
    print("\n%d. %s" % (step.number, text), flush=True)


step.number = 0


def tell(text):
    print("   " + text, flush=True)


class Cluster:
    """`durovfs dev` in a directory of its own."""

    def __init__(self, directory):
        self.directory = os.path.join(directory, "cluster")
        self.environment = dict(os.environ, DUROVFS_CONFIG=self.directory + "/client.toml")
        command = [DUROVFS, "dev", "--dir", self.directory, "--chunk-interval", "1s"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines = iter(self.process.stdout.readline, "")
        must(any(line.strip() == "ready" for line in lines), "`durovfs dev` did not get ready")
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def run(self, *arguments):
        done = subprocess.run(
            [DUROVFS, *arguments], env=self.environment, capture_output=True, text=True
        )
        must(done.returncode == 0, "durovfs %s: %s" % (" ".join(arguments), done.stderr.strip()))
        return done.stdout

    def kill(self, node):
        with open("%s/nodes/%s/sidecar.pid" % (self.directory, node)) as file:
            os.kill(int(file.read()), signal.SIGKILL)

    def start(self, node):
        self.run("dev", "--dir", self.directory, "--start", node)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=90)


class Shop:
    """The running Python program, and what it said of each order."""

    def __init__(self, cluster, database):
        command = ["/usr/bin/python3", HERE + "/demo_shop.py", EXTENSION, database]
        self.process = subprocess.Popen(
            command,
            # The refusals are told here; the extension's own lines would only repeat them.
            env=dict(cluster.environment, DUROVFS_LOG="off"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.fate = {}
        self.codes = collections.Counter()
        self.seen = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            verb, number, *rest = line.split(maxsplit=3)
            if verb == "orders":
                self.seen.append(int(number))
                continue
            self.fate[int(number)] = verb
            if rest:
                self.codes[int(rest[0])] += 1

    def count(self, verb):
        return sum(1 for fate in list(self.fate.values()) if fate == verb)

    def wait(self, enough, what, limit=45):
        deadline = time.monotonic() + limit
        while not enough():
            must(time.monotonic() < deadline, what + " did not happen")
            must(self.process.poll() is None, "the shop program ended by itself")
            time.sleep(0.02)

    def close(self):
        self.process.stdin.close()
        must(self.process.wait(timeout=30) == 0, "the shop program failed")
        self.reader.join()


def sqlite_shell(cluster, database, sql):
    """Debian's sqlite3 with the extension."""
    command = ["/usr/bin/sqlite3", "-batch", "-bail", "-cmd", ".load '%s'" % EXTENSION]
    done = subprocess.run(
        command,
        input=".open '%s'\n%s\n" % (database, sql),
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    must(done.returncode == 0, "sqlite3: " + done.stderr.strip())
    return done.stdout


def plain_rows(database, sql):
    """Debian's sqlite3 without any extension."""
    done = subprocess.run(
        ["/usr/bin/sqlite3", "-batch", database, sql], capture_output=True, text=True
    )
    must(done.returncode == 0, "sqlite3: " + done.stderr.strip())
    return done.stdout.splitlines()


def kill_and_watch(cluster, shop):
    before = shop.count("taken")
    shop.wait(lambda: shop.count("taken") >= before + 200, "200 orders")
    tell("the shop has taken %d orders, each confirmed by 3 of 5 replicas" % shop.count("taken"))

    step("Two replicas are killed (kill -9) while orders come in: nothing should change.")
    for node in ("replica-1", "replica-2"):
        cluster.kill(node)
    before = shop.count("taken")
    shop.wait(lambda: shop.count("taken") >= before + 200, "200 more orders")
    must(shop.count("refused") == 0 and shop.count("unsure") == 0, "an order failed")
    tell("200 more orders were taken, none was refused")

    step("A third replica is killed: no quorum is left, so orders must be refused, not lost.")
    cluster.kill("replica-3")
    shop.wait(lambda: shop.count("refused") >= 3, "refusals")
    taken = shop.count("taken")
    must(set(shop.codes) <= {NOT_COMMITTED, UNKNOWN, UNTOLD}, "wrong error codes: %s" % shop.codes)
    must(shop.seen[-1] == taken, "a read sees %d orders, not %d" % (shop.seen[-1], taken))
    tell("COMMIT now fails with SQLite's error %d (certainly not committed)" % NOT_COMMITTED)
    if shop.codes[UNKNOWN]:
        tell("the one that was on its way got %d (outcome unknown)" % UNKNOWN)
    tell("reading goes on: the shop still sees its %d orders" % taken)

    step("The three replicas are started again: orders go on, and the refused ones stay refused.")
    for node in ("replica-1", "replica-2", "replica-3"):
        cluster.start(node)
    before = shop.count("taken")
    shop.wait(lambda: shop.count("taken") >= before + 100, "100 more orders")
    shop.close()


def check_orders(cluster, database, shop):
    rows = sqlite_shell(cluster, database, "SELECT id FROM orders ORDER BY id;").split()
    taken = sorted(order for order, fate in shop.fate.items() if fate == "taken")
    refused = {order for order, fate in shop.fate.items() if fate == "refused"}
    present = {int(row) for row in rows}
    must(not refused & present, "refused orders are in the database")
    must(set(taken) <= present, "confirmed orders are missing")
    unsure = present - set(taken)
    must(unsure <= {o for o, fate in shop.fate.items() if fate == "unsure"}, "strange orders")
    tell("all %d confirmed orders are there, none of %d refused ones" % (len(taken), len(refused)))


def restore_before_the_accident(cluster, directory, database):
    step("Somebody drops the table. `durovfs restore` gives back the moment before.")
    recorded = sqlite_shell(cluster, database, "SELECT * FROM orders ORDER BY id;").splitlines()
    bookmark = sqlite_shell(cluster, database, "SELECT durovfs_bookmark();").strip()
    time.sleep(0.1)
    moment = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    time.sleep(0.1)
    sqlite_shell(cluster, database, "DROP TABLE orders;")
    must(
        not plain_rows(database, "SELECT name FROM sqlite_master WHERE name = 'orders'"),
        "the table is still there",
    )
    tell("the table with %d orders is gone" % len(recorded))
    # The drop itself must have reached the archive, too: then the restore has something to leave out.
    deadline = time.monotonic() + 30
    lag = "archived"
    while lag:
        must(time.monotonic() < deadline, "the archive is behind: " + lag)
        time.sleep(0.2)
        words = cluster.run("status", database).split()
        committed, archived = (words[words.index(w) + 1] for w in ("committed", "archived"))
        lag = "" if committed == archived else "%s of %s" % (archived, committed)
    for name, when in (("time", moment), ("bookmark", bookmark)):
        restored = os.path.join(directory, "restored-by-%s.db" % name)
        cluster.run("restore", database, "--at", when, "-o", restored)
        rows = plain_rows(restored, "SELECT * FROM orders ORDER BY id")
        must(rows == recorded, "the restored rows differ")
        must(plain_rows(restored, "PRAGMA integrity_check") == ["ok"], "the restored file is bad")
        tell("restore --at %s: %d rows, each compared, all equal" % (when, len(rows)))


def show(directory):
    database = os.path.join(directory, "shop.db")
    step("A cluster starts on this machine: one primary, five replicas, a directory as archive.")
    cluster = Cluster(directory)
    try:
        tell("ready")
        step("Debian's sqlite3 shell loads the extension and creates a shop's tables.")
        status = sqlite_shell(
            cluster,
            database,
            "PRAGMA journal_mode=WAL;"
            "CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT);"
            "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER, cents INTEGER);"
            "INSERT INTO customers VALUES (1, 'Ada'), (2, 'Edgar'), (3, 'Grace');"
            "SELECT json_extract(durovfs_status(), '$.protected');",
        )
        must(status.split()[-1] == "1", "durovfs_status() does not say protected: " + status)
        tell("durovfs_status() says that the database is protected")
        step("A Python program takes orders, one commit each.")
        shop = Shop(cluster, database)
        try:
            kill_and_watch(cluster, shop)
        finally:
            if shop.process.poll() is None:
                shop.process.kill()
        check_orders(cluster, database, shop)
        restore_before_the_accident(cluster, directory, database)
        step("Ctrl-C stops everything cleanly.")
        must(cluster.stop() == 0, "`durovfs dev` did not stop cleanly")
        tell("stopped")
    finally:
        cluster.stop()


def main():
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="durovfs-demo-") as directory:
        try:
            show(directory)
        except NotAsTold as problem:
            print("\nNOT AS TOLD: %s" % problem, file=sys.stderr)
            return 1
    print("\nEvery step was as told (%d seconds)." % (time.monotonic() - begin))
    return 0


sys.exit(main())
