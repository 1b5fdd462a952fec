// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! See README.md beside this directory.

#![no_main]

// Shared with a test that needs no fuzzer.
#[path = "../../tests/common/paging_input.rs"]
mod paging_input;

libfuzzer_sys::fuzz_target!(|input: &[u8]| paging_input::run(input));
