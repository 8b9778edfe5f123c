# usage: testfixture prologue.tcl SCRIPT [ARGUMENT...]
#
# Runs a script of SQLite's own test suite. With DUROVFS_EXTENSION set it first loads the extension,
# as any application does, and again whenever SQLite was shut down: that makes "unix" the default VFS.

namespace eval ::durovfs {
    variable is_loaded 0

    # "open" is the command that opens databases: the suite renames it.
    proc load {open} {
        variable is_loaded
        if {$is_loaded} return
        set is_loaded 1
        $open ::durovfs::loader :memory:
        loader enable_load_extension 1
        set path [string map {' ''} $::env(DUROVFS_EXTENSION)]
        loader eval "SELECT load_extension('$path')"
        loader close
    }

    # Opening a database initializes SQLite, too.
    proc before_open {command operation} {
        if {[string index [lindex $command 1] 0] ne "-"} { load [lindex $command 0] }
    }

    proc after_initialize {command code result operation} {
        # Some tests let it fail; then there is nothing to load into.
        set open [expr {[info commands ::sqlite_orig] eq "" ? "::sqlite3" : "::sqlite_orig"}]
        catch { load $open }
    }

    proc before_shutdown {command operation} {
        variable is_loaded 0
    }
}

if {[info exists env(DUROVFS_EXTENSION)]} {
    ::durovfs::load ::sqlite3
    # The suite must find its commands as they are: traces, and no commands in their place.
    trace add execution ::sqlite3 enter ::durovfs::before_open
    trace add execution ::sqlite3_initialize leave ::durovfs::after_initialize
    trace add execution ::sqlite3_shutdown enter ::durovfs::before_shutdown
    # A script that a test starts must not say what its test does not expect.
    set env(DUROVFS_LOG) off
}
# What SQLite's own runner of "veryquick" sets.
set G(isquick) 1

set argv0 [lindex $argv 0]
set argv [lrange $argv 1 end]
source $argv0
