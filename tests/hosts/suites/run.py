"""Runs the tests of SQLAlchemy's SQLite dialect, or some of Django's, on plain SQLite and through durovfs,
and compares the result of each test. Fails when they differ, and says where.

usage: run.py sqlalchemy|django SOURCES EXTENSION DIRECTORY   (DUROVFS_CONFIG names a cluster's)
With DUROVFS_WHOLE_SUITES=1 also the suite of SQLAlchemy that every dialect must pass.
"""

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree

HERE = os.path.dirname(os.path.abspath(__file__))
# A suite that ran less than this did not run.
IS_WHOLE = os.environ.get("DUROVFS_WHOLE_SUITES") == "1"
FEWEST_TESTS = {"sqlalchemy": 1500 if IS_WHOLE else 200, "django": 700}


def sqlalchemy(directory, environment):
    """Its own tests of the dialect, and the suite that every dialect must pass."""
    tests = ["test/dialect/sqlite", "test/dialect/test_all.py"]
    tests += ["test/dialect/test_suite.py"] if IS_WHOLE else []
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--db", "sqlite_file"]
    run(pytest + ["--junitxml", "results.xml"] + tests, directory, environment)
    outcomes = {}
    for case in xml.etree.ElementTree.parse(directory + "/results.xml").iter("testcase"):
        outcome = "passed"
        for element in case:
            if element.tag in ("failure", "error", "skipped"):
                outcome = element.tag
            if element.tag in ("failure", "error"):
                print("%s: %s: %s" % (directory, case.get("name"), element.get("message")))
        outcomes["%s.%s" % (case.get("classname"), case.get("name"))] = outcome
    return outcomes


def django(directory, environment):
    """The tests of its database backends, of transactions, and of queries."""
    options = ["--settings", "django_settings", "--parallel", "1", "--noinput"]
    # A directory of its own: beside sitecustomize.py it would load durovfs in the plain run.
    settings = directory + "/settings"
    os.mkdir(settings)
    shutil.copy(HERE + "/django_settings.py", settings)
    python_path = os.pathsep.join(filter(None, [settings, environment.get("PYTHONPATH")]))
    environment = dict(environment, SUITE_DIRECTORY=directory, PYTHONPATH=python_path)
    command = [sys.executable, "-W", "ignore", "runtests.py"] + options
    run(command + ["backends", "transactions", "queries"], directory + "/tests", environment)
    with open(directory + "/results.json") as file:
        return json.load(file)


def run(command, directory, environment):
    """The suite's own status does not matter: what its tests say does."""
    with open(directory + "/output", "w") as output:
        subprocess.run(
            command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def main():
    suite, sources, extension, directory = sys.argv[1:5]
    through = {
        "PYTHONPATH": HERE,
        "DUROVFS_EXTENSION": extension,
        "DUROVFS_CONFIG": os.environ["DUROVFS_CONFIG"],
    }
    results = {}
    for name, more in (("plain", {}), ("durovfs", through)):
        place = os.path.join(directory, name)
        shutil.copytree(os.path.join(sources, suite), place)
        environment = {"PATH": os.environ["PATH"], "HOME": place, "PYTHONDONTWRITEBYTECODE": "1"}
        environment.update(more)
        results[name] = {"sqlalchemy": sqlalchemy, "django": django}[suite](place, environment)
    plain, durovfs = results["plain"], results["durovfs"]
    different = [
        "%s: %s on plain SQLite, %s through durovfs"
        % (test, plain.get(test, "not run"), durovfs.get(test, "not run"))
        for test in sorted(plain.keys() | durovfs.keys())
        if plain.get(test) != durovfs.get(test)
    ]
    counts = {}
    for outcome in durovfs.values():
        counts[outcome] = counts.get(outcome, 0) + 1
    print("%s: %d tests: %s" % (suite, len(durovfs), counts))
    if len(plain) < FEWEST_TESTS[suite]:
        with open(os.path.join(directory, "plain", "output")) as output:
            sys.exit("%s did not run: %s" % (suite, output.read()[-4000:]))
    if different:
        sys.exit("%d differ:\n%s" % (len(different), "\n".join(different[:50])))


main()
