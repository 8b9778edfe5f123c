// Go with mattn/go-sqlite3, which brings a SQLite of its own.
package main

import (
	"database/sql"
	"fmt"
	"log"

	"github.com/mattn/go-sqlite3"
)

func main() {
	sql.Register("durovfs", &sqlite3.SQLiteDriver{Extensions: []string{"./libdurovfs"}})
	loader, err := sql.Open("durovfs", ":memory:")
	check(err)
	check(loader.Ping())

	app, err := sql.Open("sqlite3", "app.db")
	check(err)
	_, err = app.Exec("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")
	check(err)
	for number := 1; number <= 10; number++ {
		_, err = app.Exec("INSERT INTO notes (text) VALUES (?)", fmt.Sprintf("note %d", number))
		check(err)
	}

	again, err := sql.Open("sqlite3", "app.db")
	check(err)
	for _, query := range []string{
		"SELECT count(*) FROM notes", "SELECT durovfs_status()", "SELECT durovfs_bookmark()",
	} {
		var answer string
		check(again.QueryRow(query).Scan(&answer))
		fmt.Println(answer)
	}
	check(again.Close())
	check(app.Close())
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
