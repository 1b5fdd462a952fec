// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Text for people at a terminal: sizes, and rows with their columns below each other.

use std::fmt::Write as _;

use vhost_guard::protect::PAGE_SHIFT;

/// So many pages of 4 KiB in the largest unit that leaves a whole number, or with one decimal.
pub(crate) fn size(pages: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut kib = u128::from(pages) << (PAGE_SHIFT - 10);
    let mut tenths = 0;
    let mut unit = 0;
    while kib >= 1024 && unit + 1 < UNITS.len() {
        tenths = kib % 1024 * 10 / 1024;
        kib /= 1024;
        unit += 1;
    }
    match tenths {
        0 => format!("{kib} {}", UNITS[unit]),
        _ => format!("{kib}.{tenths} {}", UNITS[unit]),
    }
}

/// Rows with their columns below each other, two spaces apart.
pub(crate) fn aligned(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| printable(cell)).collect())
        .collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, &width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Without what a terminal would obey.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_in_units_that_people_use() {
        for (pages, told) in [
            (1, "4 KiB"),
            (255, "1020 KiB"),
            (256, "1 MiB"),
            (384, "1.5 MiB"),
            (1 << 18, "1 GiB"),
            (1 << 52, "16 EiB"),
        ] {
            assert_eq!(size(pages), told);
        }
    }

    #[test]
    fn what_a_terminal_would_obey_is_not_printed() {
        let out = aligned(&[vec!["a\x1b[2Jb\nc".into(), "d".into()]]);
        assert_eq!(out, "a?[2Jb?c  d\n");
    }
}
