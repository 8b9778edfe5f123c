// Node.js with better-sqlite3, which brings a SQLite of its own.
const Database = require('better-sqlite3');

const loader = new Database(':memory:');
loader.loadExtension('./libdurovfs');

const app = new Database('app.db');
app.exec('CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)');
const insert = app.prepare('INSERT INTO notes (text) VALUES (?)');
for (let number = 1; number <= 10; number++) insert.run(`note ${number}`);

const again = new Database('app.db');
for (const sql of ['SELECT count(*) FROM notes', 'SELECT durovfs_status()', 'SELECT durovfs_bookmark()'])
  console.log(again.prepare(sql).pluck().get());
