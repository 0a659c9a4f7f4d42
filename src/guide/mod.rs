//! The guide: more detail than the [crate's page](crate). It contains only documentation.
//!
//! Each chapter is also a Markdown file in `src/guide/`.

// If a link is defined twice, the first definition is used. `links.txt` links to pages of the
// reference. The definitions at the end of a chapter link to files, for readers of the repository.

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
