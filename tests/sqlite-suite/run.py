"""Runs files of SQLite's own test suite on plain SQLite and through durovfs, and compares them test
by test; called by scripts/sqlite-suite.

Every difference must be on the list `expected.toml`, with its reason, and every entry of the list
must be needed. Each file runs in directories of its own, as an unprivileged user: root may do what
some tests expect to fail.
"""

import argparse
import collections
import concurrent.futures
import fnmatch
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib

HERE = os.path.dirname(os.path.abspath(__file__))
# SQLite's own list of what runs in minutes; its longest file takes a few.
DEFAULT_SUITE = "veryquick"
FILE_TIMEOUT_S = 900
# Lines of a difference that are shown: the first tell what happened.
SHOWN_PER_FILE = 12
SHOWN_LENGTH = 300

Outcome = collections.namedtuple("Outcome", "passed failed end seconds")
Difference = collections.namedtuple("Difference", "file test what")


def parse(output):
    """Names that passed, and what was wrong with those that failed, each by the order of the run."""
    passed, failed = collections.Counter(), {}
    ended = False
    name = None
    for line in output.splitlines():
        if match := re.fullmatch(r"(\S.*?)\.\.\.(?: (Ok|Omitted))?", line):
            name = match[1]
            if match[2] == "Ok":
                passed[name] += 1
        elif match := re.match(r"Error: (.*)", line):
            if name is not None:
                failed.setdefault(name, "error: " + match[1])
        elif match := re.match(r"! (\S+) (expected|got): +(.*)", line):
            failed[match[1]] = (failed.get(match[1], "") + " %s %s" % (match[2], match[3])).strip()
        elif re.match(r"\d+ errors out of \d+ tests", line):
            ended = True
        elif match := re.match(r"!Failures on these tests: (.*)", line):
            for name in match[1].split():
                failed.setdefault(name, "failed")
    return passed, failed, ended


class Suite:
    def __init__(self, options):
        self.options = options
        self.base = options.directory
        self.source = options.source
        self.user = None
        if os.geteuid() == 0:
            self.user = pwd.getpwnam("nobody")
            os.chmod(self.base, 0o755)
        self.bin = self.directory("bin")
        for file in (options.testfixture, options.durovfs, options.extension):
            shutil.copy(file, self.bin)
        os.rename(self.bin + "/testfixture", self.bin + "/sqlite-suite-host")
        for file in ("testfixture", "prologue.tcl"):
            shutil.copy(os.path.join(HERE, file), self.bin)
        self.cluster = None

    def adapt(self, adapted):
        """Changes scripts, for both modes, that would end early through durovfs."""
        for entry in adapted:
            (path,) = [
                os.path.join(folder, entry["file"])
                for folder, _, files in os.walk(self.source)
                if entry["file"] in files
            ]
            with open(path, encoding="latin-1", newline="") as file:
                text = file.read()
            text, count = re.subn(entry["pattern"], entry["by"], text)
            if not count or not entry["reason"]:
                sys.exit("sqlite-suite: %s has nothing to adapt: %s" % (path, entry["pattern"]))
            with open(path, "w", encoding="latin-1", newline="") as file:
                file.write(text)

    def directory(self, *parts):
        path = os.path.join(self.base, *parts)
        os.makedirs(path)
        if self.user:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)
        return path

    def start(self, command, **arguments):
        if self.user:
            arguments.update(user=self.user.pw_uid, group=self.user.pw_gid, extra_groups=[])
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": self.base,
            "LANG": "C.UTF-8",
            "DUROVFS_LOG": "error",
        }
        environment.update(arguments.pop("more", {}))
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, **arguments
        )

    def start_cluster(self):
        directory = self.directory("cluster")
        command = [self.bin + "/durovfs", "dev", "--dir", directory]
        self.cluster = self.start(command, stdout=subprocess.PIPE, text=True, cwd=directory)
        if not any(line.strip() == "ready" for line in iter(self.cluster.stdout.readline, "")):
            sys.exit("sqlite-suite: `durovfs dev` did not get ready")
        threading.Thread(target=self.cluster.stdout.read, daemon=True).start()
        # The suite deletes its databases, puts copies in their place and damages them, thousands of
        # times under the same name: there the local file counts.
        with open(directory + "/client.toml") as file:
            text = file.read()
        text = re.sub(r"(?m)^keep_local = .*$", 'keep_local = ["**"]', text)
        self.config = directory + "/client-keep-local.toml"
        with open(self.config, "w") as file:
            file.write(text)

    def stop_cluster(self):
        if self.cluster:
            self.cluster.send_signal(signal.SIGINT)
            try:
                self.cluster.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(self.cluster.pid, signal.SIGKILL)

    def veryquick(self):
        """The files of SQLite's own list."""
        script = os.path.join(self.base, "list.tcl")
        with open(script, "w") as file:
            file.write(
                "source $testdir/permutations.test\n"
                "array set spec $testspec(%s)\n"
                "foreach f [lsort $spec(-files)] { puts $f }\nexit\n" % DEFAULT_SUITE
            )
        directory = self.directory("list")
        command = [self.bin + "/sqlite-suite-host", script]
        with open(script) as file:
            text = "set argv0 %s/test/x.test\nset testdir %s/test\n" % (self.source, self.source)
            text += file.read()
        with open(script, "w") as file:
            file.write(text)
        process = self.start(command, cwd=directory, stdout=subprocess.PIPE, text=True)
        output = process.communicate()[0]
        files = [line for line in output.splitlines() if line.endswith(".test")]
        return [os.path.normpath(os.path.join(self.source, "test", file)) for file in files]

    def files(self, patterns):
        found = []
        for pattern in patterns or [DEFAULT_SUITE]:
            if pattern == DEFAULT_SUITE:
                found += self.veryquick()
                continue
            folders = [os.path.join(self.source, "test")]
            extensions = os.path.join(self.source, "ext")
            folders += [folder for folder, _, _ in os.walk(extensions)]
            matching = [
                os.path.join(folder, name)
                for folder in folders
                for name in sorted(os.listdir(folder))
                if name.endswith(".test") and fnmatch.fnmatch(name, pattern)
            ]
            if not matching:
                sys.exit("sqlite-suite: no file of the suite matches %s" % pattern)
            found += matching
        return list(dict.fromkeys(found))

    def run(self, mode, path):
        """One file, in one mode."""
        name = os.path.basename(path)
        # As long in both modes: some tests count how long a path may be.
        directory = self.directory("runs", mode.ljust(len("durovfs"), "-"), name)
        log = os.path.join(self.base, "logs", "%s.%s" % (name, mode))
        os.makedirs(os.path.dirname(log), exist_ok=True)
        more = {}
        if mode == "durovfs":
            more["DUROVFS_EXTENSION"] = self.bin + "/libdurovfs.so"
            more["DUROVFS_CONFIG"] = self.config
        begun = time.monotonic()
        with open(log, "wb") as out, open(log + ".errors", "wb") as errors:
            process = self.start(
                [self.bin + "/testfixture", path],
                cwd=directory,
                stdout=out,
                stderr=errors,
                more=more,
            )
            try:
                status = process.wait(self.options.timeout)
                end = "exit %d" % status if status >= 0 else "signal %d" % -status
            except subprocess.TimeoutExpired:
                end = "not within %d s" % self.options.timeout
            finally:
                # What a test left running, too.
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
        with open(log, encoding="utf-8", errors="replace") as file:
            passed, failed, ended = parse(file.read())
        if ended:
            end = "ended"
        shutil.rmtree(directory, ignore_errors=True)
        return Outcome(passed, failed, end, time.monotonic() - begun)


def without_round(test):
    """A test injects faults in rounds, the next step failing in each, until none fails: how many
    there are tells how many steps an implementation takes, not whether it is right."""
    return re.sub(r"(-(oom|ioerr|full|shmerr|cantopen|interrupt)(-\w+)?)\.\d+$", r"\1", test)


def compare(file, plain, through):
    """What differs: a test that fails only through durovfs, or is run only there or only here."""
    differences = []
    run_plain = {without_round(test) for test in (*plain.passed, *plain.failed)}
    run_through = {without_round(test) for test in (*through.passed, *through.failed)}
    not_run = [test for test in plain.passed if without_round(test) not in run_through]
    if through.end != plain.end:
        what = "%s, plain SQLite: %s" % (through.end, plain.end)
        if not_run:
            what += "; %d tests not run, the first is %s" % (len(not_run), not_run[0])
        differences.append(Difference(file, "(end)", what))
        not_run = []
    for test, what in through.failed.items():
        if test not in plain.failed:
            differences.append(Difference(file, test, what))
    differences += [Difference(file, test, "not run through durovfs") for test in not_run]
    for test in through.passed:
        if without_round(test) not in run_plain:
            differences.append(Difference(file, test, "run through durovfs only"))
    return differences


class Expected:
    """The differences that are meant to be."""

    def __init__(self, path):
        with open(path, "rb") as file:
            lists = tomllib.load(file)
        self.left_out = {entry["file"]: entry["reason"] for entry in lists.get("left_out", [])}
        self.adapted = lists.get("adapted", [])
        self.entries = lists.get("differs", [])
        for entry in self.entries:
            assert entry["reason"] and entry["tests"], entry
        self.used = set()

    def covers(self, difference):
        for index, entry in enumerate(self.entries):
            if fnmatch.fnmatch(difference.file, entry["file"]) and any(
                fnmatch.fnmatchcase(difference.test, test) for test in entry["tests"]
            ):
                self.used.add(index)
                return True
        return False

    def unneeded(self, files):
        return [
            entry
            for index, entry in enumerate(self.entries)
            if index not in self.used
            and not entry.get("sometimes")
            and any(fnmatch.fnmatch(file, entry["file"]) for file in files)
        ]


def shorten(text):
    return text if len(text) <= SHOWN_LENGTH else text[:SHOWN_LENGTH] + "…"


def run_all(suite, expected, paths):
    """Runs the files and prints what differs; true when all is as expected."""
    options = suite.options
    tests = collections.Counter()
    surprises = 0

    def both(path):
        plain = suite.run("plain", path)
        return plain, None if options.plain else suite.run("durovfs", path)

    pool = concurrent.futures.ThreadPoolExecutor(options.jobs)
    try:
        running = {pool.submit(both, path): path for path in paths}
        for done in concurrent.futures.as_completed(running):
            file = os.path.basename(running[done])
            plain, through = done.result()
            tests["plain"] += sum(plain.passed.values())
            tests["plain failed"] += len(plain.failed)
            seconds = "%.1f s" % plain.seconds
            if through is None:
                print("%s: %d tests, %s, %s" % (file, sum(plain.passed.values()), plain.end, seconds))
                for test, what in plain.failed.items():
                    print("    %s: %s" % (test, shorten(what)))
                continue
            tests["durovfs"] += sum(through.passed.values())
            differences = compare(file, plain, through)
            new = [d for d in differences if not expected.covers(d)]
            surprises += len(new)
            summary = "%d tests, %d differ" % (sum(through.passed.values()), len(differences))
            summary += " (%d of them unexpected)" % len(new) if new else ""
            print("%s: %s; %s plain, %.1f s" % (file, summary, seconds, through.seconds), flush=True)
            for difference in new[:SHOWN_PER_FILE]:
                print("    %s: %s" % (difference.test, shorten(difference.what)))
            if len(new) > SHOWN_PER_FILE:
                print("    and %d more" % (len(new) - SHOWN_PER_FILE))
    finally:
        pool.shutdown(cancel_futures=True)
    return tests, surprises


def main():
    parser = argparse.ArgumentParser(prog="scripts/sqlite-suite")
    parser.add_argument("--plain", action="store_true", help="on plain SQLite only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="files at a time")
    parser.add_argument("--timeout", type=int, default=FILE_TIMEOUT_S, help="seconds per file")
    parser.add_argument("--without", action="append", default=[], metavar="PATTERN", help="not these")
    parser.add_argument("--part", default="1/1", help="M/N: the M-th of N equal parts of the files")
    for name in ("directory", "source", "testfixture", "durovfs", "extension"):
        parser.add_argument("--" + name, required=True, help=argparse.SUPPRESS)
    parser.add_argument(
        "patterns",
        nargs="*",
        metavar="PATTERN",
        help="names of test files, as wal*.test; or veryquick: SQLite's own list (default)",
    )
    options = parser.parse_args()
    expected = Expected(os.path.join(HERE, "expected.toml"))
    suite = Suite(options)
    suite.adapt(expected.adapted)
    paths = suite.files(options.patterns)
    for path in [path for path in paths if os.path.basename(path) in expected.left_out]:
        name = os.path.basename(path)
        print("%s: left out: %s" % (name, expected.left_out[name]))
        paths.remove(path)
    for pattern in options.without:
        paths = [path for path in paths if not fnmatch.fnmatch(os.path.basename(path), pattern)]
    part, parts = (int(number) for number in options.part.split("/"))
    paths = paths[part - 1 :: parts]
    begun = time.monotonic()
    # The nodes are no children of this process: it must not end without ending them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("sqlite-suite: told to stop"))
    try:
        if not options.plain:
            suite.start_cluster()
        tests, surprises = run_all(suite, expected, paths)
    finally:
        suite.stop_cluster()
    unneeded = [] if options.plain else expected.unneeded([os.path.basename(p) for p in paths])
    for entry in unneeded:
        print("no longer needed in expected.toml: %s %s" % (entry["file"], entry["tests"]))
    print(
        "%d files, %d tests passed on plain SQLite (%d failed), %d through durovfs; "
        "%d unexpected differences, %d entries not needed; %.0f s"
        % (
            len(paths),
            tests["plain"],
            tests["plain failed"],
            tests["durovfs"],
            surprises,
            len(unneeded),
            time.monotonic() - begun,
        )
    )
    sys.exit(1 if surprises or unneeded else 0)


if __name__ == "__main__":
    main()
