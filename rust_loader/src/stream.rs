//! The endless stream of training sequences: which row of which shard stands at which position.
//!
//! A sequence is a window of `seq_length + 1` tokens inside one shard; neighbours share one token, so
//! that every token but a shard's first is predicted once. Windows are counted per shard, not over
//! the concatenation, so that a row is always one contiguous piece of one file; the tokens left over
//! at a shard's end are counted as dropped. The order permutes units: single sequences, or blocks of
//! consecutive ones. With several sources the positions are dealt out in fixed shares.

use crate::error::{Error, Result};
use crate::options::ShardFacts;
use crate::order::{Permutation, Purpose};
use crate::sizes::to_usize;

/// Where a row's tokens begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Row {
    /// Index of the shard in the set.
    pub shard: u32,
    /// Its first token in the shard.
    pub start: u64,
}

/// In which order a stream runs through its sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// A fresh permutation for every epoch, for ever.
    Shuffled {
        /// Key of the permutations.
        seed: u64,
        /// Consecutive sequences that stay together; 1 shuffles single sequences.
        block: u64,
    },
    /// First to last, once.
    InOrder,
    /// The first `size` of a permutation with a constant key, once.
    Sample {
        /// Sequences in the sample.
        size: u64,
    },
}

/// One source of a stream: consecutive shards and their share of the positions.
#[derive(Clone, Copy, Debug)]
pub struct SourceFacts {
    /// Tells its order from that of the other sources.
    pub id: u64,
    /// Number of its shards in the set.
    pub shard_count: u32,
    /// Units of it in every cycle of the mixture; 1 for a single source.
    pub units_per_cycle: u64,
}

#[derive(Debug)]
struct Source {
    id: u64,
    first_shard: u32,
    /// Units before each shard, and in all: one entry more than shards.
    starts: Vec<u64>,
    units_per_cycle: u64,
    /// Units per cycle of this source and the ones after it.
    rest_per_cycle: u64,
}

impl Source {
    fn units(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }
}

/// How far one source of a stream has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Sequences of it handed out.
    pub sequences: u64,
    /// Whole epochs of it handed out.
    pub epoch: u64,
}

/// The permutations that positions were last looked up in, one a source: their keys are hashes, which
/// consecutive batches need not work out again.
#[derive(Debug, Default)]
pub struct Orders(Vec<Option<(u64, Permutation)>>);

/// A pure function from position to row.
#[derive(Debug)]
pub struct Stream {
    seq_length: u64,
    order: Order,
    unit: u64,
    sources: Vec<Source>,
    dropped_tokens: u64,
}

impl Stream {
    /// The stream over `facts`, which the `parts` divide in order.
    ///
    /// # Errors
    /// [`Error::TooShort`] when a source has no whole unit.
    pub fn new(facts: &[ShardFacts], parts: &[SourceFacts], seq_length: u64, order: Order) -> Result<Self> {
        let unit = match order {
            Order::Shuffled { block, .. } => block,
            _ => 1,
        };
        let mut stream =
            Self { seq_length, order, unit, sources: Vec::with_capacity(parts.len()), dropped_tokens: 0 };
        let mut rest_per_cycle = parts.iter().map(|part| part.units_per_cycle).sum();
        let mut first_shard = 0;
        for part in parts {
            let shards = &facts[first_shard as usize..][..part.shard_count as usize];
            let starts = stream.count_units(shards);
            stream.sources.push(Source {
                id: part.id,
                first_shard,
                starts,
                units_per_cycle: part.units_per_cycle,
                rest_per_cycle,
            });
            rest_per_cycle -= part.units_per_cycle;
            first_shard += part.shard_count;
            if stream.sources.last().is_none_or(|source| source.units() == 0) {
                return Err(Error::TooShort {
                    needed: unit * seq_length + 1,
                    longest: shards.iter().map(|shard| shard.words).max().unwrap_or(0),
                });
            }
        }
        Ok(stream)
    }

    fn count_units(&mut self, shards: &[ShardFacts]) -> Vec<u64> {
        let mut starts = Vec::with_capacity(shards.len() + 1);
        let mut units = 0;
        starts.push(0);
        for shard in shards {
            let here = shard.words.saturating_sub(1) / self.seq_length / self.unit;
            let used = if here == 0 { 0 } else { here * self.unit * self.seq_length + 1 };
            self.dropped_tokens += shard.words - used;
            units += here;
            starts.push(units);
        }
        starts
    }

    /// Sequences in one epoch of source `source`.
    #[must_use]
    pub fn sequences(&self, source: usize) -> u64 {
        self.sources[source].units() * self.unit
    }

    /// Tokens of all sources that no sequence holds.
    #[must_use]
    pub fn dropped_tokens(&self) -> u64 {
        self.dropped_tokens
    }

    /// Tokens in a row: one more than a sequence is long, for the shifted targets.
    #[must_use]
    pub fn width(&self) -> u64 {
        self.seq_length + 1
    }

    /// Positions before the stream ends; None when it never does.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        match self.order {
            Order::Shuffled { .. } => None,
            Order::InOrder => Some((0..self.sources.len()).map(|source| self.sequences(source)).sum()),
            Order::Sample { size } => Some(size.min(self.sequences(0))),
        }
    }

    /// How far each source is when `positions` sequences of the stream were handed out.
    #[must_use]
    pub fn progress(&self, positions: u64) -> Vec<Progress> {
        let (units, offset) = (positions / self.unit, positions % self.unit);
        let current = self.deal(units).0;
        let mut progress = Vec::with_capacity(self.sources.len());
        for (index, source) in self.sources.iter().enumerate() {
            let partial = if index == current { offset } else { 0 };
            let sequences = self.units_before(index, units) * self.unit + partial;
            let epoch = sequences / (source.units() * self.unit);
            progress.push(Progress { sequences, epoch });
        }
        progress
    }

    /// The rows at every `step`-th of the positions `first..first + count`.
    ///
    /// # Errors
    /// [`Error::End`] when the order does not wrap and ends before.
    pub fn rows(&self, first: u64, count: u64, step: u64) -> Result<Vec<Row>> {
        self.rows_with(first, count, step, &mut Orders::default())
    }

    /// As [`Stream::rows`], with `orders` kept from one call on this stream to the next.
    ///
    /// # Errors
    /// As [`Stream::rows`].
    pub fn rows_with(&self, first: u64, count: u64, step: u64, orders: &mut Orders) -> Result<Vec<Row>> {
        if let Some(length) = self.length() {
            let last = first + count.saturating_sub(1);
            if last >= length {
                return Err(Error::End { position: last, length });
            }
        }
        orders.0.resize(self.sources.len(), None);
        let positions = (first..first + count).step_by(to_usize(step));
        Ok(positions.map(|position| self.row(position, &mut orders.0)).collect())
    }

    fn row(&self, position: u64, orders: &mut [Option<(u64, Permutation)>]) -> Row {
        let (index, unit) = match self.order {
            Order::InOrder => self.source_in_order(position),
            _ => self.deal(position / self.unit),
        };
        let source = &self.sources[index];
        let unit = self.permuted(source, unit, &mut orders[index]);
        let shard = source.starts.partition_point(|&start| start <= unit) - 1;
        let window = (unit - source.starts[shard]) * self.unit + position % self.unit;
        #[allow(clippy::cast_possible_truncation, reason = "below the number of shards, a u32")]
        let shard = source.first_shard + shard as u32;
        Row { shard, start: window * self.seq_length }
    }

    fn permuted(&self, source: &Source, unit: u64, order: &mut Option<(u64, Permutation)>) -> u64 {
        let (purpose, seed) = match self.order {
            Order::InOrder => return unit,
            Order::Sample { .. } => (Purpose::Evaluation, 0),
            Order::Shuffled { seed, block: 1 } => (Purpose::Sequences, seed),
            Order::Shuffled { seed, .. } => (Purpose::Blocks, seed),
        };
        let (epoch, place) = (unit / source.units(), unit % source.units());
        match order {
            Some((known, permutation)) if *known == epoch => permutation.apply(place),
            _ => {
                let fresh = Permutation::new(purpose, source.id, seed, epoch, source.units());
                order.insert((epoch, fresh)).1.apply(place)
            }
        }
    }

    fn source_in_order(&self, position: u64) -> (usize, u64) {
        let mut left = position;
        for (index, source) in self.sources.iter().enumerate() {
            if left < source.units() {
                return (index, left);
            }
            left -= source.units();
        }
        (self.sources.len() - 1, left) // not reached: `rows` checked the length
    }

    /// Which source unit `unit` of the stream comes from, and how many of that source came before.
    ///
    /// Each source is dealt evenly (as Bresenham draws a line) over the places that the sources before
    /// it left free. A cycle is dealt like every other, so any stretch as long as a cycle holds exactly
    /// `units_per_cycle` of each source.
    fn deal(&self, unit: u64) -> (usize, u64) {
        let cycle = self.sources.first().map_or(1, |source| source.rest_per_cycle);
        let (cycles, mut place) = (unit / cycle, unit % cycle);
        let last = self.sources.len() - 1;
        for (index, source) in self.sources.iter().enumerate().take(last) {
            let before = source.dealt(place);
            if source.dealt(place + 1) > before {
                return (index, cycles * source.units_per_cycle + before);
            }
            place -= before;
        }
        (last, cycles * self.sources[last].units_per_cycle + place)
    }

    /// Units of source `index` among the first `units` of the stream.
    fn units_before(&self, index: usize, units: u64) -> u64 {
        let cycle = self.sources.first().map_or(1, |source| source.rest_per_cycle);
        let (cycles, mut place) = (units / cycle, units % cycle);
        for source in &self.sources[..index] {
            place -= source.dealt(place);
        }
        let source = &self.sources[index];
        cycles * source.units_per_cycle + source.dealt(place)
    }
}

impl Source {
    /// Units of this source in the first `places` places of a cycle that earlier sources left free.
    #[allow(clippy::cast_possible_truncation, reason = "at most `places`, a u64")]
    fn dealt(&self, places: u64) -> u64 {
        let product = u128::from(places) * u128::from(self.units_per_cycle);
        (product / u128::from(self.rest_per_cycle)) as u64
    }
}

#[cfg(test)]
mod tests;
