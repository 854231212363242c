//! The order as a whole: complete, without repeats, and found anywhere in constant time.

use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

fn facts(sizes: &[u64]) -> Vec<ShardFacts> {
    sizes.iter().map(|&words| ShardFacts { folder: 0, file: "shard".into(), words, xxh3: None }).collect()
}

fn single(sizes: &[u64], seq_length: u64, order: Order) -> Result<Stream> {
    let shard_count = u32::try_from(sizes.len()).unwrap();
    let part = SourceFacts { id: 0, shard_count, units_per_cycle: 1 };
    Stream::new(&facts(sizes), &[part], seq_length, order)
}

fn rows(stream: &Stream, first: u64, count: u64) -> Vec<Row> {
    stream.rows(first, count, 1).unwrap()
}

/// A stream of sources with one shard each, `sequences[i]` long, dealt as `units` says.
fn mixture(sequences: &[u64], units: &[u64]) -> Stream {
    let facts = facts(&sequences.iter().map(|count| count * 4 + 1).collect::<Vec<_>>());
    let parts: Vec<SourceFacts> = (0..)
        .zip(units)
        .map(|(id, &units_per_cycle)| SourceFacts { id, shard_count: 1, units_per_cycle })
        .collect();
    Stream::new(&facts, &parts, 4, Order::Shuffled { seed: 1, block: 1 }).unwrap()
}

#[test]
fn data_without_a_whole_unit_is_refused_with_both_numbers() {
    let order = Order::Shuffled { seed: 0, block: 2 };
    let error = single(&[8, 3], 4, order).unwrap_err();
    assert!(matches!(error, Error::TooShort { needed: 9, longest: 8 }));
    assert!(single(&[9, 3], 4, order).is_ok());
}

#[test]
fn orders_that_do_not_wrap_end() {
    let stream = single(&[41], 4, Order::InOrder).unwrap();
    assert_eq!(stream.length(), Some(10));
    assert!(matches!(stream.rows(8, 3, 1), Err(Error::End { position: 10, length: 10 })));
    assert_eq!(single(&[41], 4, Order::Sample { size: 99 }).unwrap().length(), Some(10));
}

#[test]
fn a_block_stays_together() {
    let stream = single(&[100, 57, 200], 4, Order::Shuffled { seed: 3, block: 5 }).unwrap();
    for block in rows(&stream, 0, 2 * stream.sequences(0)).chunks(5) {
        for (offset, row) in (0..).zip(block) {
            assert_eq!(*row, Row { shard: block[0].shard, start: block[0].start + 4 * offset });
        }
    }
}

#[test]
fn a_mixture_deals_every_stretch_of_a_cycle_exactly() {
    let stream = mixture(&[7, 11, 3, 30], &[5, 1, 3, 11]);
    for first in 0..60 {
        let mut counts = [0; 4];
        for row in rows(&stream, first, 20) {
            counts[row.shard as usize] += 1;
        }
        assert_eq!(counts, [5, 1, 3, 11], "from {first} on");
    }
}

#[test]
fn a_mixture_runs_through_whole_epochs_of_every_source() {
    let stream = mixture(&[7, 11, 3], &[5, 1, 3]);
    let mut per_source = vec![Vec::new(); 3];
    for row in rows(&stream, 0, 2000) {
        per_source[row.shard as usize].push(row.start);
    }
    for (source, length) in [7, 11, 3].into_iter().enumerate() {
        for epoch in per_source[source].chunks_exact(length) {
            assert_eq!(epoch.iter().collect::<HashSet<_>>().len(), length);
        }
    }
}

proptest! {
    #[test]
    fn an_epoch_holds_every_window_once(
        sizes in prop::collection::vec(0_u64..120, 1..6),
        seq_length in 1_u64..9,
        block in 1_u64..5,
        seed: u64,
        epoch in 0_u64..1000,
    ) {
        let Ok(stream) = single(&sizes, seq_length, Order::Shuffled { seed, block }) else {
            return Ok(());
        };
        let sequences = stream.sequences(0);
        let rows = rows(&stream, epoch * sequences, sequences);
        let distinct: HashSet<_> = rows.iter().collect();
        prop_assert_eq!(distinct.len(), rows.len());
        for row in &rows {
            prop_assert_eq!(row.start % seq_length, 0);
            prop_assert!(row.start + seq_length < sizes[row.shard as usize]);
        }
        let total: u64 = sizes.iter().sum();
        let used: HashSet<_> = rows
            .iter()
            .flat_map(|row| (row.start..=row.start + seq_length).map(|token| (row.shard, token)))
            .collect();
        prop_assert_eq!(used.len() as u64 + stream.dropped_tokens(), total);
    }

    #[test]
    fn progress_counts_what_was_dealt(
        units in prop::collection::vec(1_u64..40, 1..6),
        positions in 0_u64..500,
    ) {
        let stream = mixture(&vec![9; units.len()], &units);
        let mut counts = vec![0; units.len()];
        for row in rows(&stream, 0, positions) {
            counts[row.shard as usize] += 1;
        }
        for (progress, count) in stream.progress(positions).into_iter().zip(counts) {
            prop_assert_eq!(progress, Progress { sequences: count, epoch: count / 9 });
        }
    }

    #[test]
    fn any_position_is_found_without_those_before_it(
        sizes in prop::collection::vec(20_u64..120, 1..6),
        position in 0_u64..1 << 40,
        seed: u64,
    ) {
        let stream = single(&sizes, 4, Order::Shuffled { seed, block: 1 }).unwrap();
        prop_assert_eq!(rows(&stream, position, 3)[1], rows(&stream, position + 1, 1)[0]);
    }
}
