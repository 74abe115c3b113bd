//! OpenAI's routes, with what TGI adds to them.

pub(crate) mod calls;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod habits;
pub(crate) mod models;
pub(crate) mod shared;
pub(crate) mod tools;
pub(crate) mod wire;
