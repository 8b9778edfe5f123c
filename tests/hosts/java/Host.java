// Java with sqlite-jdbc, which brings a SQLite of its own.
import java.sql.DriverManager;

class Host {
    public static void main(String[] arguments) throws Exception {
        var loader = DriverManager.getConnection("jdbc:sqlite::memory:?enable_load_extension=true");
        loader.createStatement().execute("SELECT load_extension('./libdurovfs')");

        var app = DriverManager.getConnection("jdbc:sqlite:app.db");
        app.createStatement().execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)");
        var insert = app.prepareStatement("INSERT INTO notes (text) VALUES (?)");
        for (int number = 1; number <= 10; number++) {
            insert.setString(1, "note " + number);
            insert.executeUpdate();
        }

        var again = DriverManager.getConnection("jdbc:sqlite:app.db");
        String[] queries = {
            "SELECT count(*) FROM notes", "SELECT durovfs_status()", "SELECT durovfs_bookmark()"
        };
        for (var query : queries) {
            System.out.println(again.createStatement().executeQuery(query).getString(1));
        }
        again.close();
        app.close();
    }
}
