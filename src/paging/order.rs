// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a plan to an order, on the table as it is by then.
//!
//! A plan says of millions of pages that they get nothing. Only where something holds now does that
//! have to be asked for. Pure.

use super::plan::{Piece, Plan};
use crate::protect::{Order, Protection, Table};

/// What a plan comes to on a table.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlannedOrder {
    /// What is to be set. Its entries are disjoint and ascending.
    pub order: Order,
    /// For each entry of the order, the entry of the plan that it comes from.
    pub origins: Vec<usize>,
}

/// An order would have more entries than it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {0} ranges would have to be set")]
pub struct TooManyPieces(pub usize);

impl Plan {
    /// The order that gives pages for good what the plan gives them, and leaves all others as they
    /// are. [`Plan::refused`] is for the caller to look at first, here and in [`Self::protect`].
    ///
    /// # Errors
    ///
    /// It would have more than `most` entries.
    pub fn lock(&self, most: usize) -> Result<PlannedOrder, TooManyPieces> {
        let pieces = self.given();
        if pieces.len() > most {
            return Err(TooManyPieces(most));
        }
        let (entries, origins) = pieces.map(split).unzip();
        Ok(PlannedOrder {
            order: Order::Lock(entries),
            origins,
        })
    }

    /// The order that gives pages what the plan gives them, and frees those of its other pages on
    /// which something holds in `table`.
    ///
    /// # Errors
    ///
    /// It would have more than `most` entries.
    pub fn protect(&self, table: &Table, most: usize) -> Result<PlannedOrder, TooManyPieces> {
        if self.given().len() > most {
            return Err(TooManyPieces(most));
        }
        let mut pieces: Vec<Piece> = self.given().collect();
        for held in table.iter() {
            self.each_within(held.range, |piece| {
                if piece.attributes.is_free() && pieces.len() <= most {
                    free(&mut pieces, piece);
                }
            });
        }
        if pieces.len() > most {
            return Err(TooManyPieces(most));
        }
        pieces.sort_unstable_by_key(|piece| piece.range.start());
        let (entries, origins) = pieces.into_iter().map(split).unzip();
        Ok(PlannedOrder {
            order: Order::Protect(entries),
            origins,
        })
    }

    /// The first entry by which [`Self::protect`] would loosen a page that is immutable in `table`.
    #[must_use]
    pub fn loosens(&self, table: &Table) -> Option<usize> {
        let mut first = None;
        for held in table.iter().filter(|held| held.attributes.is_immutable()) {
            self.each_within(held.range, |piece| {
                if held.attributes.is_loosened_by(piece.attributes) {
                    first = Some(first.map_or(piece.entry, |entry: usize| entry.min(piece.entry)));
                }
            });
        }
        first
    }
}

/// Adds a piece that is to be freed, to the one before it if they touch.
fn free(pieces: &mut Vec<Piece>, piece: Piece) {
    if let Some(last) = pieces.last_mut()
        && (last.attributes, last.entry) == (piece.attributes, piece.entry)
        && let Some(joined) = last.range.followed_by(piece.range)
    {
        last.range = joined;
    } else {
        pieces.push(piece);
    }
}

fn split(piece: Piece) -> (Protection, usize) {
    let Piece {
        range,
        attributes,
        entry,
    } = piece;
    (Protection { range, attributes }, entry)
}
