//! Tests of the journal as a whole.

mod support;

mod basics;
mod compact;
mod limits;
mod mending;
mod model;
mod recovery;
