# Perl with DBD::SQLite.
use strict;
use warnings;
use DBI;

my $loader = DBI->connect("dbi:SQLite:dbname=:memory:", "", "", { RaiseError => 1 });
$loader->sqlite_enable_load_extension(1);
$loader->sqlite_load_extension("./libdurovfs");

my $app = DBI->connect("dbi:SQLite:dbname=app.db", "", "", { RaiseError => 1 });
$app->do("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)");
$app->do("INSERT INTO notes (text) VALUES (?)", undef, "note $_") for 1 .. 10;

my $again = DBI->connect("dbi:SQLite:dbname=app.db", "", "", { RaiseError => 1 });
for my $sql ("SELECT count(*) FROM notes", "SELECT durovfs_status()", "SELECT durovfs_bookmark()") {
    print $again->selectrow_array($sql), "\n";
}
