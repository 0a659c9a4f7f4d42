use crate::{Error, Result};

const MAX_NAME_BYTES: usize = 1_024;

/// Checks a projection's name: 1 to 1,024 bytes of UTF-8, without NUL.
///
/// All stores refuse the same names. A custom store calls this first in each method that takes a name.
///
/// # Errors
///
/// [`Error::InvalidProjection`] with the reason.
///
/// # Examples
///
/// ```
/// use checkpoint_store::validate_projection;
///
/// assert!(validate_projection("orders by customer, v2 📦").is_ok());
/// assert!(validate_projection("").is_err());
/// assert!(validate_projection("nul \0 inside").is_err());
/// assert!(validate_projection(&"x".repeat(1_025)).is_err());
/// ```
pub fn validate_projection(name: &str) -> Result<()> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_NAME_BYTES {
        "it is longer than 1,024 bytes"
    } else if name.as_bytes().contains(&0) {
        "it contains a NUL character"
    } else {
        return Ok(());
    };
    Err(Error::InvalidProjection { name: name.to_owned(), reason })
}

/// Checks an offset: zero or more.
///
/// # Errors
///
/// [`Error::InvalidOffset`] if it is negative.
///
/// # Examples
///
/// ```
/// use checkpoint_store::validate_offset;
///
/// assert!(validate_offset(0).is_ok());
/// assert!(validate_offset(-1).is_err());
/// ```
pub fn validate_offset(offset: i64) -> Result<()> {
    if offset < 0 {
        return Err(Error::InvalidOffset { offset, reason: "an offset must not be negative" });
    }
    Ok(())
}

/// Checks the arguments of [`advance`](crate::CheckpointStore::advance): the name, both offsets, and
/// that `to` is not less than `from`.
///
/// # Errors
///
/// [`Error::InvalidProjection`]; [`Error::InvalidOffset`] if either offset is negative or `to` is
/// less than `from`.
///
/// # Examples
///
/// ```
/// use checkpoint_store::validate_advance;
///
/// assert!(validate_advance("orders", 5, 6).is_ok());
/// assert!(validate_advance("orders", 5, 5).is_ok());
/// assert!(validate_advance("orders", 5, 4).is_err());
/// ```
pub fn validate_advance(projection: &str, from: i64, to: i64) -> Result<()> {
    validate_projection(projection)?;
    validate_offset(from)?;
    validate_offset(to)?;
    if to < from {
        let reason = "`advance` cannot move a checkpoint back";
        return Err(Error::InvalidOffset { offset: to, reason });
    }
    Ok(())
}

/// Checks the arguments of `save_many`, so that invalid input changes nothing.
pub(crate) fn validate_all(checkpoints: &[(&str, i64)]) -> Result<()> {
    checkpoints.iter().try_for_each(|&(projection, offset)| {
        validate_projection(projection)?;
        validate_offset(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_name_is_counted_in_bytes() {
        assert!(validate_projection(&"ü".repeat(512)).is_ok());
        assert!(validate_projection(&"ü".repeat(513)).is_err());
    }

    #[test]
    fn advance_accepts_the_same_offset_and_refuses_a_lower_one() {
        assert!(validate_advance("p", 5, 5).is_ok());
        assert!(matches!(validate_advance("p", 5, 4), Err(Error::InvalidOffset { offset: 4, .. })));
        assert!(matches!(
            validate_advance("p", -1, 4),
            Err(Error::InvalidOffset { offset: -1, .. })
        ));
    }
}
