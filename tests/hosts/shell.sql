.load ./libdurovfs
.open app.db
CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT);
INSERT INTO notes (text) VALUES ('note 1');
INSERT INTO notes (text) VALUES ('note 2');
INSERT INTO notes (text) VALUES ('note 3');
INSERT INTO notes (text) VALUES ('note 4');
INSERT INTO notes (text) VALUES ('note 5');
INSERT INTO notes (text) VALUES ('note 6');
INSERT INTO notes (text) VALUES ('note 7');
INSERT INTO notes (text) VALUES ('note 8');
INSERT INTO notes (text) VALUES ('note 9');
INSERT INTO notes (text) VALUES ('note 10');
.open app.db
SELECT count(*) FROM notes;
SELECT durovfs_status();
SELECT durovfs_bookmark();
