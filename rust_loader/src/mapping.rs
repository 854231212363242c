//! The one place that turns a file into memory. Every `unsafe` about maps is in this file.
//!
//! No reference into a map is ever made: other processes may write to the file, which Rust's `&`
//! forbids. Words are copied out through raw pointers, and views leave as pointers.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{Advice, Mmap, MmapOptions};

const WORD: usize = size_of::<u32>();
const CACHE_LINE_WORDS: usize = 16;

/// The beginning of a page's part of a row: the CPU's own prefetcher follows from there to the page's end.
const PREFETCH_WORDS: usize = 256;

/// Maps begin on a multiple of this; a larger page of the machine is a multiple of it too.
const PAGE: usize = 4096;
const RESIDENCY_PAGES: usize = 64;

/// A shard, mapped read-only for as long as this value lives.
#[derive(Debug)]
pub struct Mapping {
    map: Mmap,
}

impl Mapping {
    /// Maps the first `words` tokens of `file`. `words` must not be 0.
    pub fn new(file: &File, words: usize) -> io::Result<Self> {
        // SAFETY: the map is only read through raw pointers (`copy_to`, `pointer`), so bytes that
        // another process changes are never behind a Rust reference. Truncation is guarded by the
        // size check before each use, see `shard::OpenShard`.
        let map = unsafe { MmapOptions::new().len(words * WORD).map(file)? };
        Ok(Self { map })
    }

    /// Tokens in the map.
    #[must_use]
    pub fn words(&self) -> usize {
        self.map.len() / WORD
    }

    /// Address of token `start`; `len` tokens from there are inside the map.
    ///
    /// # Panics
    /// When the range is not inside the map.
    #[must_use]
    #[allow(clippy::cast_ptr_alignment, reason = "a map begins on a page")]
    pub fn pointer(&self, start: usize, len: usize) -> *const u32 {
        assert!(start <= self.words() && len <= self.words() - start, "row outside of its shard");
        self.map.as_ptr().cast::<u32>().wrapping_add(start)
    }

    /// Copies the tokens from `start` on into `row`.
    pub fn copy_to(&self, start: usize, row: &mut [u32]) {
        let from = self.pointer(start, row.len());
        // SAFETY: `pointer` checked that `row.len()` words lie inside the map; a map begins on a
        // page, so they are aligned; `row` is a Rust buffer and cannot overlap a read-only map.
        unsafe { std::ptr::copy_nonoverlapping(from, row.as_mut_ptr(), row.len()) }
    }

    /// Copies the tokens from `start` on into `row`, widened to 64 bits.
    pub fn widen_to(&self, start: usize, row: &mut [i64]) {
        let from = self.pointer(start, row.len());
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2; `pointer` checked the range.
            return unsafe { widen_avx2(from, row) };
        }
        // SAFETY: `pointer` checked the range.
        unsafe { widen(from, row) }
    }

    /// Asks the CPU to fetch the first tokens, on every page, of a row that will be copied next.
    pub fn prefetch(&self, start: usize, len: usize) {
        let from = self.pointer(start, len);
        #[cfg(target_arch = "x86_64")]
        for part in (0..len).step_by(PAGE / WORD) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // The first page's part begins where the row does, the others' on a page.
            let begin = if part == 0 { 0 } else { part - from.addr() % PAGE / WORD };
            for line in (begin..len.min(begin + PREFETCH_WORDS)).step_by(CACHE_LINE_WORDS) {
                // SAFETY: a prefetch has no effect on memory and never faults, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line).cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (from, CACHE_LINE_WORDS);
    }

    /// Says that the whole map will be read, in large pages where the file system has them. Only
    /// advice: a kernel that refuses it changes nothing but speed.
    pub fn expect_all(&self) {
        let _ = self.map.advise(Advice::HugePage);
    }

    /// Says that rows will be read here and there. Only advice.
    pub fn expect_random(&self) {
        let _ = self.map.advise(Advice::Random);
    }

    /// Starts reading `len` tokens from `start` on, without waiting. Only advice.
    pub fn will_need(&self, start: usize, len: usize) {
        let _ = self.map.advise_range(Advice::WillNeed, start * WORD, len * WORD);
    }

    /// True when the pages of `len` tokens from `start` on are in memory, so that touching them needs no
    /// storage. False also when the system does not tell.
    #[must_use]
    pub fn resident(&self, start: usize, len: usize) -> bool {
        let from = self.pointer(start, len).addr();
        let first = from / PAGE * PAGE;
        let bytes = from + len * WORD - first;
        let mut pages = [0_u8; RESIDENCY_PAGES];
        for chunk in (0..bytes).step_by(RESIDENCY_PAGES * PAGE) {
            let size = (bytes - chunk).min(RESIDENCY_PAGES * PAGE);
            let place = self.map.as_ptr().with_addr(first + chunk).cast_mut().cast();
            // SAFETY: mincore only looks at page tables; the range lies in the map, begins on a page,
            // and `pages` has a byte for each of its pages.
            let told = unsafe { libc::mincore(place, size, pages.as_mut_ptr()) };
            if told != 0 || pages[..size.div_ceil(PAGE)].iter().any(|page| page & 1 == 0) {
                return false;
            }
        }
        true
    }

    /// Reads and maps `len` tokens from `start` on.
    ///
    /// # Errors
    /// `EFAULT` when the file no longer holds them: the error that a plain access would have
    /// turned into SIGBUS. Kernels before Linux 5.14 do not know the call and read nothing.
    pub fn populate(&self, start: usize, len: usize) -> io::Result<()> {
        let first = start * WORD / PAGE * PAGE;
        let result = self.map.advise_range(Advice::PopulateRead, first, (start + len) * WORD - first);
        match result {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            other => other,
        }
    }
}

/// Reads as many words from `from` on as `row` has places.
///
/// # Safety
/// All of them lie inside a live map, which begins on a page, so that they are aligned.
#[inline(always)]
#[allow(clippy::inline_always, reason = "compiled anew for each instruction set that calls it")]
unsafe fn widen(from: *const u32, row: &mut [i64]) {
    for (i, word) in row.iter_mut().enumerate() {
        // SAFETY: `i` is below `row.len()`, which the caller vouches for.
        *word = i64::from(unsafe { from.add(i).read() });
    }
}

/// As [`widen`], with vectors twice as wide.
///
/// # Safety
/// As [`widen`], on a CPU with AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn widen_avx2(from: *const u32, row: &mut [i64]) {
    // SAFETY: the caller vouches for it.
    unsafe { widen(from, row) }
}
