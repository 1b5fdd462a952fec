// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the benchmarks take a time that is to be set against another of the same run.

use std::hint::black_box;

use rustix::time::{ClockId, clock_gettime};

/// Processor time of this thread, in microseconds.
pub(crate) fn micros<T>(run: impl FnOnce() -> T) -> f64 {
    let now = || {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        now.tv_sec as f64 * 1e6 + now.tv_nsec as f64 / 1e3
    };
    let start = now();
    black_box(run());
    now() - start
}

pub(crate) fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
