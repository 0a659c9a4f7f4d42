//! What a thread is inside of. What runs there may call the same store again, and must not wait for itself.

use std::cell::RefCell;
use std::ptr;

use crate::sync::thread_local;

thread_local! {
    /// The addresses of the things that the thread is inside of.
    #[allow(clippy::missing_const_for_thread_local)] // loom's macro takes no `const`
    static INSIDE: RefCell<Vec<usize>> = RefCell::new(Vec::new());
}

/// The calling thread is inside of a thing until this is dropped, by a panic too.
pub(crate) struct Inside;

impl Inside {
    pub(crate) fn enter<T>(thing: &T) -> Self {
        // When the thread has ended so far that its storage is gone, nothing is remembered, and what would be
        // refused waits until its deadline.
        let _ = INSIDE.try_with(|things| things.borrow_mut().push(ptr::from_ref(thing).addr()));
        Self
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = INSIDE.try_with(|things| things.borrow_mut().pop());
    }
}

pub(crate) fn is_inside<T>(thing: &T) -> bool {
    let address = ptr::from_ref(thing).addr();
    INSIDE.try_with(|things| things.borrow().contains(&address)).unwrap_or(false)
}
