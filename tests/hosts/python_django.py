"""Django, on Python's own SQLite: the settings load the extension."""

import sqlite3

import django
from django.conf import settings

loader = sqlite3.connect(":memory:")
loader.enable_load_extension(True)
loader.load_extension("./libdurovfs")

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "app.db"}},
    USE_TZ=True,
)
django.setup()

from django.db import connection, models, transaction  # noqa: E402


class Note(models.Model):
    text = models.CharField(max_length=100)

    class Meta:
        app_label = "hosts"
        db_table = "notes"


with connection.schema_editor() as editor:
    editor.create_model(Note)
for number in range(1, 11):
    with transaction.atomic():
        Note.objects.create(text="note %d" % number)
connection.close()

print(Note.objects.count())
with connection.cursor() as cursor:
    for sql in ("SELECT durovfs_status()", "SELECT durovfs_bookmark()"):
        print(cursor.execute(sql).fetchone()[0])
