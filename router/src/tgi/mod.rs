//! TGI's own routes.

pub(crate) mod generate;
pub(crate) mod info;
pub(crate) mod stream;
pub(crate) mod tokenize;
pub(crate) mod wire;
