// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Keeps log lines that a guest or a peer can cause from becoming a flood.
//!
//! One [`LogLimit`] for each class of line: a token bucket that says how many lines it held back.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::token_bucket::TokenBucket;

/// A token bucket for one class of log lines.
#[derive(Debug)]
pub(crate) struct LogLimit {
    burst: u32,
    bucket: Mutex<Option<Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    tokens: TokenBucket,
    suppressed: u64,
}

/// Leave to write one line. Displayed at the end of the line, it says what was held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Permit {
    suppressed: u64,
}

impl LogLimit {
    /// Lets `burst` lines through at once, and one more every second.
    pub(crate) const fn new(burst: u32) -> Self {
        Self {
            burst,
            bucket: Mutex::new(None),
        }
    }

    /// Asks for leave to write a line now.
    pub(crate) fn permit(&self) -> Option<Permit> {
        self.permit_at(Instant::now())
    }

    fn permit_at(&self, now: Instant) -> Option<Permit> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = bucket.get_or_insert(Bucket {
            tokens: TokenBucket::new(self.burst, 1, now),
            suppressed: 0,
        });
        if !bucket.tokens.take(now) {
            bucket.suppressed += 1;
            return None;
        }
        Some(Permit {
            suppressed: std::mem::take(&mut bucket.suppressed),
        })
    }
}

impl fmt::Display for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.suppressed {
            0 => Ok(()),
            n => write!(f, " ({n} such lines suppressed before)"),
        }
    }
}

/// Logs a line at most as often as its limit allows.
macro_rules! log_limited {
    ($limit:expr, $level:ident, $($arg:tt)+) => {
        if log::log_enabled!(log::Level::$level)
            && let Some(permit) = $limit.permit()
        {
            log::log!(log::Level::$level, "{}{permit}", format_args!($($arg)+));
        }
    };
}
pub(crate) use log_limited;

/// An error followed by its sources, for a log line.
#[cfg(feature = "companion")]
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn std::error::Error + 'a));

#[cfg(feature = "companion")]
impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_passes_then_one_line_a_second_with_the_count_of_the_others() {
        let start = Instant::now();
        let limit = LogLimit::new(3);
        for _ in 0..3 {
            assert_eq!(limit.permit_at(start), Some(Permit { suppressed: 0 }));
        }
        for _ in 0..1000 {
            assert_eq!(limit.permit_at(start), None);
        }
        let later = start + Duration::from_secs(1);
        let permit = limit.permit_at(later).unwrap();
        assert_eq!(permit.to_string(), " (1000 such lines suppressed before)");
        assert_eq!(limit.permit_at(later), None);
        assert_eq!(
            limit.permit_at(later + Duration::from_secs(9)),
            Some(Permit { suppressed: 1 })
        );
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_no_lines() {
        let start = Instant::now() + Duration::from_secs(5);
        let limit = LogLimit::new(1);
        assert!(limit.permit_at(start).is_some());
        assert!(limit.permit_at(start - Duration::from_secs(5)).is_none());
        assert!(limit.permit_at(start).is_none());
    }
}
