# Tcl.
package require sqlite3

sqlite3 loader :memory:
loader enable_load_extension 1
loader eval {SELECT load_extension('./libdurovfs')}

sqlite3 app app.db
app eval {CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)}
for {set number 1} {$number <= 10} {incr number} {
    set text "note $number"
    app eval {INSERT INTO notes (text) VALUES ($text)}
}

sqlite3 again app.db
foreach sql {{SELECT count(*) FROM notes} {SELECT durovfs_status()} {SELECT durovfs_bookmark()}} {
    puts [again onecolumn $sql]
}
