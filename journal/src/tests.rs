//! Tests of the journal as a whole.

mod support;

mod basics;
mod limits;
mod model;
mod recovery;
