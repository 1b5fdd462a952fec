// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the fuzz target `paging` does, on random bytes and without a fuzzer.

use proptest::collection::vec;
use proptest::prelude::*;

#[path = "common/paging_input.rs"]
mod paging_input;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn no_bytes_break_a_walk(input in vec(any::<u8>(), 0..20 + 6 * 400)) {
        paging_input::run(&input);
    }
}
