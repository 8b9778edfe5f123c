<?php
// PHP. It loads extensions from the directory sqlite3.extension_dir of php.ini only.
$loader = new SQLite3(':memory:');
$loader->loadExtension('libdurovfs.so');

$app = new SQLite3('app.db');
$app->enableExceptions(true);
$app->exec('CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)');
for ($number = 1; $number <= 10; $number++) {
    $app->exec("INSERT INTO notes (text) VALUES ('note $number')");
}

// PDO has no way to load extensions; it uses the same SQLite.
$again = new PDO('sqlite:app.db');
foreach (['SELECT count(*) FROM notes', 'SELECT durovfs_status()', 'SELECT durovfs_bookmark()'] as $sql) {
    echo $again->query($sql)->fetchColumn(), "\n";
}
