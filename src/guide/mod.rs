//! What goes deeper than the [crate's page](crate): documentation only.

#[doc = include_str!("operations.md")]
pub mod operations {}

#[doc = include_str!("reliability.md")]
pub mod reliability {}

#[doc = include_str!("from_csharp.md")]
pub mod from_csharp {}

#[doc = include_str!("questions.md")]
pub mod questions {}
