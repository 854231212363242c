//! The order of samples: a keyed permutation of `0..n` in constant memory.
//!
//! A Feistel network over the smallest power of two that holds `n`, with cycle walking back into
//! the domain (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The key of every
//! round is a hash of (purpose, seed, epoch, round), so no two (seed, epoch) pairs share an order,
//! as they would with `seed + epoch`.

use xxhash_rust::xxh3::xxh3_64;

/// Rounds of the network. Statistically four suffice with a strong mixer; each costs about 3 ns.
const ROUNDS: usize = 6;

/// Smallest block in bits. Halves of fewer than four bits leave visible patterns in small orders.
const MIN_BITS: u32 = 8;

/// What an order is for. Orders of different purposes are unrelated even for equal seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Order of single sequences in training.
    Sequences,
    /// Order of blocks of consecutive sequences in training.
    Blocks,
    /// The fixed sample that an evaluation takes.
    Evaluation,
}

impl Purpose {
    fn tag(self) -> u64 {
        match self {
            Self::Sequences => 1,
            Self::Blocks => 2,
            Self::Evaluation => 3,
        }
    }
}

/// A bijection on `0..n`, a pure function of (purpose, source, seed, epoch, n).
#[derive(Clone, Debug)]
pub struct Permutation {
    n: u64,
    low_bits: u32,
    high_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The order of epoch `epoch` under `seed`; `source` tells the sources of a mixture apart.
    #[must_use]
    pub fn new(purpose: Purpose, source: u64, seed: u64, epoch: u64, n: u64) -> Self {
        let bits = (u64::BITS - n.saturating_sub(1).leading_zeros()).max(MIN_BITS);
        let mut keys = [0; ROUNDS];
        for (round, key) in (0_u64..).zip(&mut keys) {
            let fields = [purpose.tag(), source, seed, epoch, round];
            *key = xxh3_64(bytemuck::cast_slice(&fields));
        }
        Self { n, low_bits: bits / 2, high_bits: bits - bits / 2, keys }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.n
    }

    /// True for the permutation of nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Where `index` goes. `index` must be below [`Self::len`].
    #[must_use]
    pub fn apply(&self, index: u64) -> u64 {
        debug_assert!(index < self.n);
        let mut value = self.encrypt(index);
        while value >= self.n {
            value = self.encrypt(value);
        }
        value
    }

    /// The index that goes to `value`: the inverse of [`Self::apply`].
    #[must_use]
    pub fn invert(&self, value: u64) -> u64 {
        debug_assert!(value < self.n);
        let mut index = self.decrypt(value);
        while index >= self.n {
            index = self.decrypt(index);
        }
        index
    }

    // Odd block sizes have halves of unequal width: even rounds change the high half and odd rounds
    // the low one, so that no half ever changes its width.
    fn encrypt(&self, block: u64) -> u64 {
        let (mut high, mut low) = (block >> self.low_bits, block & mask(self.low_bits));
        for pair in self.keys.chunks_exact(2) {
            high ^= mix(low, pair[0]) & mask(self.high_bits);
            low ^= mix(high, pair[1]) & mask(self.low_bits);
        }
        high << self.low_bits | low
    }

    fn decrypt(&self, block: u64) -> u64 {
        let (mut high, mut low) = (block >> self.low_bits, block & mask(self.low_bits));
        for pair in self.keys.chunks_exact(2).rev() {
            low ^= mix(high, pair[1]) & mask(self.low_bits);
            high ^= mix(low, pair[0]) & mask(self.high_bits);
        }
        high << self.low_bits | low
    }
}

fn mask(bits: u32) -> u64 {
    (1 << bits) - 1
}

/// The finaliser of splitmix64 (Steele, Lea and Flood, 2014) over half and key.
fn mix(half: u64, key: u64) -> u64 {
    let mut x = half ^ key;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order(seed: u64, epoch: u64, n: u64) -> Vec<u64> {
        let permutation = Permutation::new(Purpose::Sequences, 0, seed, epoch, n);
        (0..n).map(|index| permutation.apply(index)).collect()
    }

    fn is_bijection(seed: u64, n: u64) -> bool {
        let mut hit = vec![false; usize::try_from(n).unwrap()];
        order(seed, 0, n).into_iter().all(|value| {
            let slot = &mut hit[usize::try_from(value).unwrap()];
            !std::mem::replace(slot, true)
        })
    }

    /// Chi-square of `counts` against equal shares, as standard deviations from its mean.
    fn chi_square_z(counts: &[u64]) -> f64 {
        let to_f64 = |count: u64| f64::from(u32::try_from(count).unwrap());
        let cells = to_f64(counts.len() as u64);
        let expected = to_f64(counts.iter().sum()) / cells;
        let chi: f64 = counts.iter().map(|&c| (to_f64(c) - expected).powi(2) / expected).sum();
        (chi - (cells - 1.0)) / (2.0 * (cells - 1.0)).sqrt()
    }

    #[test]
    fn every_small_size_is_a_bijection() {
        for n in 1..=1024 {
            assert!(is_bijection(n ^ 0xfeed, n), "n = {n}");
        }
    }

    #[test]
    fn nothing_is_a_permutation_too() {
        let empty = Permutation::new(Purpose::Sequences, 0, 1, 0, 0);
        assert!(empty.is_empty());
        assert_eq!(order(1, 0, 1), [0]);
    }

    #[test]
    fn seed_plus_epoch_does_not_repeat_an_order() {
        assert_ne!(order(5, 1, 1000), order(6, 0, 1000));
        assert_ne!(order(5, 0, 1000), order(5, 1, 1000));
    }

    #[test]
    fn purposes_and_sources_have_unrelated_orders() {
        let first = |purpose, source| {
            let permutation = Permutation::new(purpose, source, 7, 0, 1 << 20);
            (0..8).map(|index| permutation.apply(index)).collect::<Vec<_>>()
        };
        let base = first(Purpose::Sequences, 0);
        assert_ne!(base, first(Purpose::Blocks, 0));
        assert_ne!(base, first(Purpose::Evaluation, 0));
        assert_ne!(base, first(Purpose::Sequences, 1));
    }

    #[test]
    fn the_order_is_pinned() {
        // A change here changes every run in the world that resumes: never by accident.
        assert_eq!(order(1234, 0, 10), [7, 1, 8, 9, 0, 4, 6, 5, 2, 3]);
    }

    #[test]
    fn one_flipped_bit_of_the_seed_changes_half_of_the_output() {
        let (seed, n) = (0x63_u64, 1 << 32);
        let (mut flipped, mut total) = (0, 0);
        for bit in 0..64 {
            let one = Permutation::new(Purpose::Sequences, 0, seed, 3, n);
            let other = Permutation::new(Purpose::Sequences, 0, seed ^ (1 << bit), 3, n);
            for index in 0..64 {
                flipped += (one.apply(index) ^ other.apply(index)).count_ones();
                total += 32;
            }
        }
        let share = f64::from(flipped) / f64::from(total);
        assert!((share - 0.5).abs() < 0.01, "{share}");
    }

    #[test]
    fn one_flipped_bit_of_the_index_changes_half_of_the_output() {
        let permutation = Permutation::new(Purpose::Sequences, 0, 42, 0, 1 << 40);
        for bit in 0..40 {
            let flipped: u32 = (0..256_u64)
                .map(|i| i * 0x9e37_79b9 % (1 << 40))
                .map(|i| (permutation.apply(i) ^ permutation.apply(i ^ (1 << bit))).count_ones())
                .sum();
            let share = f64::from(flipped) / (256.0 * 40.0);
            assert!((share - 0.5).abs() < 0.03, "bit {bit}: {share}");
        }
    }

    #[test]
    fn all_orders_of_four_are_equally_likely() {
        let mut counts = std::collections::HashMap::new();
        for seed in 0..24_000 {
            *counts.entry(order(seed, 0, 4)).or_insert(0_u64) += 1;
        }
        assert_eq!(counts.len(), 24);
        let counts: Vec<u64> = counts.into_values().collect();
        assert!(chi_square_z(&counts).abs() < 4.0);
    }

    #[test]
    fn every_position_gets_every_value_equally_often() {
        for n in [3_u64, 17, 256, 300] {
            for position in [0, n / 2, n - 1] {
                let mut counts = vec![0; usize::try_from(n).unwrap()];
                for seed in 0..100 * n {
                    let order = Permutation::new(Purpose::Sequences, 0, seed, 5, n);
                    counts[usize::try_from(order.apply(position)).unwrap()] += 1;
                }
                let z = chi_square_z(&counts);
                assert!(z.abs() < 4.0, "n = {n}, position {position}: {z}");
            }
        }
    }

    #[test]
    fn steps_between_neighbours_show_no_pattern() {
        let n = 48_800;
        for seed in 0..10 {
            let order = order(seed, 0, n);
            let mut counts = [0_u64; 64];
            for pair in order.windows(2) {
                let step = (pair[1] + n - pair[0]) % n;
                counts[usize::try_from(step * 64 / n).unwrap()] += 1;
            }
            assert!(chi_square_z(&counts).abs() < 4.5);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn sizes_up_to_two_to_the_sixteen_are_bijections(seed: u64, n in 1025_u64..=65_536) {
            prop_assert!(is_bijection(seed, n));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn large_sizes_stay_inside_and_invert(seed: u64, epoch: u64, n in 1_u64..=1 << 48, at: u64) {
            let permutation = Permutation::new(Purpose::Blocks, 3, seed, epoch, n);
            let index = at % n;
            let value = permutation.apply(index);
            prop_assert!(value < n);
            prop_assert_eq!(permutation.invert(value), index);
        }
    }
}
