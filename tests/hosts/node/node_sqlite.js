// Node.js with its own module, node:sqlite (from Node.js 22 on).
const { DatabaseSync } = require('node:sqlite');

const loader = new DatabaseSync(':memory:', { allowExtension: true });
loader.loadExtension('./libdurovfs.so');

const app = new DatabaseSync('app.db');
app.exec('CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)');
const insert = app.prepare('INSERT INTO notes (text) VALUES (?)');
for (let number = 1; number <= 10; number++) insert.run(`note ${number}`);

const again = new DatabaseSync('app.db');
for (const sql of ['SELECT count(*) AS a FROM notes', 'SELECT durovfs_status() AS a', 'SELECT durovfs_bookmark() AS a'])
  console.log(again.prepare(sql).get().a);
