//! Rules of the replica, one by one.
