//! Rules of the primary, one by one.
