// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest frame numbers and ranges of them.
//!
//! A [`GfnRange`] that exists is non-empty and its arithmetic cannot overflow, so nothing
//! behind the edge has to check that again. Knows nothing of what a range is for.

use std::fmt;

/// Bits of an address inside a page: a page is 4096 bytes.
pub const PAGE_SHIFT: u32 = 12;

/// A guest frame number: a guest-physical address shifted right by [`PAGE_SHIFT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(u64);

impl Gfn {
    /// The highest frame number of a 64-bit address space.
    pub const MAX: Gfn = Gfn((1 << (64 - PAGE_SHIFT)) - 1);

    /// The frame with this number, or `None` above [`Gfn::MAX`].
    #[must_use]
    pub fn new(number: u64) -> Option<Self> {
        (number <= Self::MAX.0).then_some(Self(number))
    }

    /// The number itself.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// Why two numbers are not a range of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// A number is above [`Gfn::MAX`].
    #[error("frame number {0:#x} is above the address space")]
    TooHigh(u64),
    /// The range would end before it starts.
    #[error("range starts at frame {start:#x}, after its end {end:#x}")]
    Reversed {
        /// First frame asked for.
        start: u64,
        /// Last frame asked for.
        end: u64,
    },
}

/// A non-empty run of guest frames (of 4096 bytes); both ends belong to it, as in `struct
/// heki_pa_range`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GfnRange {
    start: Gfn,
    end: Gfn,
}

impl GfnRange {
    /// The frames `start..=end`.
    ///
    /// # Errors
    ///
    /// A number above [`Gfn::MAX`], or `start` after `end`, in this order.
    pub fn new(start: u64, end: u64) -> Result<Self, RangeError> {
        let gfn = |number| Gfn::new(number).ok_or(RangeError::TooHigh(number));
        let (start, end) = (gfn(start)?, gfn(end)?);
        if start > end {
            return Err(RangeError::Reversed {
                start: start.0,
                end: end.0,
            });
        }
        Ok(Self { start, end })
    }

    /// The frames that the `len` bytes from guest-physical address `gpa` on touch; `None` for no
    /// bytes, or for bytes beyond the end of the 64-bit address space.
    #[must_use]
    pub fn of_bytes(gpa: u64, len: u64) -> Option<Self> {
        let last = gpa.checked_add(len.checked_sub(1)?)?;
        Self::new(gpa >> PAGE_SHIFT, last >> PAGE_SHIFT).ok()
    }

    /// First frame.
    pub fn start(self) -> Gfn {
        self.start
    }

    /// Last frame, which belongs to the range.
    pub fn end(self) -> Gfn {
        self.end
    }

    /// This range and `next`, if that begins where this ends.
    #[must_use]
    pub fn followed_by(self, next: Self) -> Option<Self> {
        (self.end.0 + 1 == next.start.0).then_some(Self {
            start: self.start,
            end: next.end,
        })
    }

    /// How many frames: at least 1, at most 2^52.
    #[must_use]
    pub fn pages(self) -> u64 {
        self.end.0 - self.start.0 + 1
    }
}

impl fmt::Display for GfnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start.0, self.end.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_address_space_is_a_range() {
        let all = GfnRange::new(0, Gfn::MAX.number()).unwrap();
        assert_eq!(all.pages(), 1 << 52);
    }

    #[test]
    fn bytes_touch_the_frames_of_their_first_and_last() {
        let frames =
            |gpa, len| GfnRange::of_bytes(gpa, len).map(|r| (r.start().number(), r.end().number()));
        assert_eq!(frames(0x1000, 0x1000), Some((1, 1)));
        assert_eq!(frames(0x1fff, 2), Some((1, 2)));
        assert_eq!(frames(0x1fff, 0), None);
        assert_eq!(
            frames(u64::MAX, 1),
            Some((Gfn::MAX.number(), Gfn::MAX.number()))
        );
        assert_eq!(frames(u64::MAX, 2), None);
    }

    #[test]
    fn bad_numbers_are_refused_with_their_reason() {
        let max = Gfn::MAX.number();
        assert_eq!(GfnRange::new(0, max + 1), Err(RangeError::TooHigh(max + 1)));
        assert_eq!(
            GfnRange::new(u64::MAX, 0),
            Err(RangeError::TooHigh(u64::MAX))
        );
        assert_eq!(
            GfnRange::new(6, 5),
            Err(RangeError::Reversed { start: 6, end: 5 })
        );
        assert_eq!(GfnRange::new(5, 5).unwrap().pages(), 1);
    }
}
