"""Makes durovfs the default for a program that does not know it: Python runs this file first, when
PYTHONPATH names its directory."""

import os
import sqlite3

loader = sqlite3.connect(":memory:")
loader.enable_load_extension(True)
loader.load_extension(os.environ["DUROVFS_EXTENSION"])

# Deleting the file of a protected database does not delete the database: it comes back from its
# log, which SQLAlchemy's tests do not expect when they delete one to begin anew. Here the content
# goes, and the file stays.
unlink = os.remove


def remove(path, **options):
    if not os.path.exists(os.fspath(path) + "-durovfs"):
        unlink(path, **options)
        return
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA writable_schema = ON")
    database.execute("DELETE FROM sqlite_master")
    database.execute("PRAGMA writable_schema = RESET")
    database.execute("VACUUM")
    database.close()


os.remove = remove
