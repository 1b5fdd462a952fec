// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages that QEMU might send, and what becomes of them.

use proptest::prelude::*;

use super::super::encode::header;
use super::*;

fn decode(bytes: &[u8]) -> Result<Message, WireError> {
    let (head, payload) = bytes.split_first_chunk().unwrap();
    let header = Header::decode(head)?;
    Message::decode(&header, &payload[..header.payload_len()])
}

proptest! {
    #[test]
    fn no_payload_makes_the_decoder_panic(
        kind in 1u16..7,
        ranges in 0usize..20,
        mut payload in prop::collection::vec(any::<u8>(), 16 + 24 * 20),
        plausible in any::<bool>(),
    ) {
        let length = match kind {
            TYPE_HELLO => HELLO_SIZE as usize,
            TYPE_STATE | TYPE_MSR_STATE => 16 + 24 * ranges,
            TYPE_RESULT => RESULT_SIZE as usize,
            TYPE_VIOLATION => VIOLATION_SIZE as usize,
            _ => RESET_SIZE as usize,
        };
        if plausible && matches!(kind, TYPE_STATE | TYPE_MSR_STATE) {
            payload[8..12].copy_from_slice(&(ranges as u32).to_le_bytes());
            payload[12..16].fill(0);
        }
        let mut bytes = header(kind, length as u32, 1);
        bytes.extend(&payload[..length]);
        let _ = decode(&bytes);
    }

    #[test]
    fn no_header_lets_more_in_than_the_largest_payload(bytes in any::<[u8; HEADER_SIZE]>()) {
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert!(header.payload_len() <= MAX_PAYLOAD as usize);
        }
    }
}

#[test]
fn what_is_told_as_state_is_the_table() {
    let mut bytes = header(TYPE_STATE, 16 + 2 * RANGE_SIZE, 9);
    for word in [3u64, 2, 1, 5, 1 << 63 | 1, 6, 6, 1 << 63 | 1] {
        bytes.extend(word.to_le_bytes());
    }
    let Ok(Message::State {
        seq: 9,
        generation: 3,
        table,
    }) = decode(&bytes)
    else {
        panic!("{:?}", decode(&bytes));
    };
    // Two ranges that touch and agree are one.
    assert_eq!(table.len(), 1);
    assert_eq!(table.pages(), 6);
}
