"""Settings for Django's own tests: databases in files, and a runner that writes down the result of
each test."""

import json
import os
import unittest

from django.test.runner import DiscoverRunner

DATABASES = {
    name: {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": "%s.db" % name,
        "TEST": {"NAME": os.path.join(os.environ["SUITE_DIRECTORY"], "test_%s.db" % name)},
    }
    for name in ("default", "other")
}
SECRET_KEY = "not secret"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
TEST_RUNNER = "django_settings.Runner"


class Result(unittest.TextTestResult):
    outcomes = {}

    def note(self, test, outcome):
        # A subtest that failed counts more than the success of what is around it.
        self.outcomes.setdefault(test.id(), outcome)

    def addSuccess(self, test):
        super().addSuccess(test)
        self.note(test, "passed")

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.note(test, "failed")

    def addError(self, test, error):
        super().addError(test, error)
        self.note(test, "failed")

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is not None:
            self.note(test, "failed")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.note(test, "skipped")

    def addExpectedFailure(self, test, error):
        super().addExpectedFailure(test, error)
        self.note(test, "failed as expected")

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.note(test, "passed unexpectedly")


class Runner(DiscoverRunner):
    def get_resultclass(self):
        return Result

    def run_suite(self, suite, **options):
        result = super().run_suite(suite, **options)
        with open(os.path.join(os.environ["SUITE_DIRECTORY"], "results.json"), "w") as file:
            json.dump(Result.outcomes, file)
        return result
