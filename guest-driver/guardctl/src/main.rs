// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `guardctl`: protects a guest's memory by way of `/dev/guard`, and shows what is protected.

fn main() {}
