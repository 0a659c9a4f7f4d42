//! What goes deeper than the [crate's page](crate). Documentation only.
//!
//! The chapters are the files in `src/guide/`, and can be read there too.

// Of two definitions of a link the first one counts. Those of `links.txt` lead to a page of the
// reference, and those at the end of a chapter, for who reads it in the repository, to another file.

#[doc = include_str!("links.txt")]
#[cfg_attr(any(not(doctest), feature = "postgres"), doc = include_str!("exactly_once.md"))]
pub mod exactly_once {}

#[doc = include_str!("links.txt")]
#[cfg_attr(any(not(doctest), feature = "postgres"), doc = include_str!("recipes.md"))]
pub mod recipes {}

#[doc = include_str!("links.txt")]
#[cfg_attr(any(not(doctest), feature = "postgres"), doc = include_str!("threads.md"))]
pub mod threads {}

#[doc = include_str!("links.txt")]
#[cfg_attr(any(not(doctest), feature = "postgres"), doc = include_str!("operations.md"))]
pub mod operations {}

#[doc = include_str!("links.txt")]
#[cfg_attr(any(not(doctest), feature = "postgres"), doc = include_str!("sizing.md"))]
pub mod sizing {}

#[doc = include_str!("links.txt")]
#[cfg_attr(any(not(doctest), feature = "postgres"), doc = include_str!("reliability.md"))]
pub mod reliability {}

#[doc = include_str!("links.txt")]
#[cfg_attr(any(not(doctest), feature = "postgres"), doc = include_str!("from_csharp.md"))]
pub mod from_csharp {}

#[doc = include_str!("links.txt")]
#[cfg_attr(any(not(doctest), feature = "postgres"), doc = include_str!("questions.md"))]
pub mod questions {}
