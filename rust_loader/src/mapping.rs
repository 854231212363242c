//! The one place that turns a file into memory. Every `unsafe` about maps is here and in `guard`.
//!
//! No reference into a map is ever made: other processes may write to the file, which Rust's `&`
//! forbids. Words are copied out through raw pointers, and views leave as pointers.
#![allow(unsafe_code)]

mod guard;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{Advice, Mmap, MmapOptions};

const WORD: usize = size_of::<u32>();
const CACHE_LINE_WORDS: usize = 16;

/// Maps begin on a multiple of this; a larger page of the machine is a multiple of it too.
const PAGE: usize = 4096;
const RESIDENCY_PAGES: usize = 64;

/// A place in a map that will be read soon. Nothing is ever read through it.
#[derive(Clone, Copy, Debug)]
pub struct Place(*const u32);

impl Place {
    /// No place in particular.
    pub const NOWHERE: Self = Self(std::ptr::null());
}

/// A shard, mapped read-only for as long as this value lives.
#[derive(Debug)]
pub struct Mapping {
    map: Mmap,
    /// Set when a page of it was found to be gone; it stays so, and zeros stand there.
    lost: AtomicBool,
}

impl Mapping {
    /// Maps the first `words` tokens of `file`. `words` must not be 0.
    pub fn new(file: &File, words: usize) -> io::Result<Self> {
        // SAFETY: the map is only read through raw pointers (`copy_to`, `pointer`), so bytes that
        // another process changes are never behind a Rust reference. Copies out of a map whose file
        // was cut off end well, see `guard`.
        let map = unsafe { MmapOptions::new().len(words * WORD).map(file)? };
        guard::install();
        Ok(Self { map, lost: AtomicBool::new(false) })
    }

    /// True once a page of the map was found to be gone: its zeros are no tokens.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
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

    /// Where `len` tokens from `start` on lie.
    #[must_use]
    pub fn place(&self, start: usize, len: usize) -> Place {
        Place(self.pointer(start, len))
    }

    /// Copies the tokens from `start` on into `row`, and lets the CPU fetch as many from `ahead` on, which
    /// will be copied next. False when the map is lost.
    #[must_use]
    pub fn copy_to(&self, start: usize, row: &mut [u32], ahead: Place) -> bool {
        let from = self.pointer(start, row.len());
        guard::guarded(from, row.len() * WORD, &self.lost, || {
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the CPU has AVX2; `pointer` checked the range.
                return unsafe { copy_avx2(from, row, ahead) };
            }
            // SAFETY: `pointer` checked the range.
            unsafe { copy(from, row, ahead) }
        })
    }

    /// As [`Self::copy_to`], widened to 64 bits.
    #[must_use]
    pub fn widen_to(&self, start: usize, row: &mut [i64], ahead: Place) -> bool {
        let from = self.pointer(start, row.len());
        guard::guarded(from, row.len() * WORD, &self.lost, || {
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the CPU has AVX2; `pointer` checked the range.
                return unsafe { widen_avx2(from, row, ahead) };
            }
            // SAFETY: `pointer` checked the range.
            unsafe { widen(from, row, ahead) }
        })
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

/// Asks the CPU for the cache line at `place`: one line ahead for each that is copied, so that a row's misses
/// are under way while the row before it is copied.
#[inline(always)]
#[allow(clippy::inline_always, reason = "one instruction")]
fn prefetch(place: *const u32) {
    // Not the intrinsic: the compiler would move all of a row's out of the loop, behind the copying.
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect on memory and never faults, whatever the address.
    unsafe {
        std::arch::asm!("prefetcht0 [{}]", in(reg) place, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Copies as many words from `from` on as `row` has places.
///
/// # Safety
/// All of them lie inside a live map, which begins on a page, so that they are aligned.
#[inline(always)]
#[allow(clippy::inline_always, reason = "compiled again for each instruction set that calls it")]
unsafe fn copy(from: *const u32, row: &mut [u32], ahead: Place) {
    let (lines, rest) = row.as_chunks_mut::<CACHE_LINE_WORDS>();
    let whole = lines.len() * CACHE_LINE_WORDS;
    for (line, part) in lines.iter_mut().enumerate() {
        let offset = line * CACHE_LINE_WORDS;
        prefetch(ahead.0.wrapping_add(offset));
        // SAFETY: `offset` and a line's words are inside the row, which the caller vouches for; `row` is a
        // Rust buffer and cannot overlap a read-only map.
        unsafe { std::ptr::copy_nonoverlapping(from.add(offset), part.as_mut_ptr(), CACHE_LINE_WORDS) };
    }
    // SAFETY: as above; `whole + rest.len()` is the row's length.
    unsafe { std::ptr::copy_nonoverlapping(from.add(whole), rest.as_mut_ptr(), rest.len()) };
}

/// As [`copy`], with vectors twice as wide.
///
/// # Safety
/// As [`copy`], on a CPU with AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_avx2(from: *const u32, row: &mut [u32], ahead: Place) {
    // SAFETY: the caller vouches for it.
    unsafe { copy(from, row, ahead) }
}

/// As [`copy`], widened.
///
/// # Safety
/// As [`copy`].
#[inline(always)]
#[allow(clippy::inline_always, reason = "compiled again for each instruction set that calls it")]
unsafe fn widen(from: *const u32, row: &mut [i64], ahead: Place) {
    let (lines, rest) = row.as_chunks_mut::<CACHE_LINE_WORDS>();
    let whole = lines.len() * CACHE_LINE_WORDS;
    for (line, part) in lines.iter_mut().enumerate() {
        let offset = line * CACHE_LINE_WORDS;
        prefetch(ahead.0.wrapping_add(offset));
        for (i, word) in part.iter_mut().enumerate() {
            // SAFETY: `offset + i` is below the row's length, which the caller vouches for.
            *word = i64::from(unsafe { from.add(offset + i).read() });
        }
    }
    for (i, word) in rest.iter_mut().enumerate() {
        // SAFETY: as above.
        *word = i64::from(unsafe { from.add(whole + i).read() });
    }
}

/// As [`widen`], with vectors twice as wide.
///
/// # Safety
/// As [`copy`], on a CPU with AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn widen_avx2(from: *const u32, row: &mut [i64], ahead: Place) {
    // SAFETY: the caller vouches for it.
    unsafe { widen(from, row, ahead) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(words: u32) -> (File, Mapping) {
        let content: Vec<u32> = (0..words).collect();
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, bytemuck::cast_slice(&content)).unwrap();
        let map = Mapping::new(&file, content.len()).unwrap();
        (file, map)
    }

    #[test]
    fn rows_of_every_length_are_copied_whole() {
        let (_file, map) = mapped(5000);
        for len in (0..70).chain([1023, 1024, 2049]) {
            let (mut narrow, mut wide) = (vec![0; len], vec![0; len]);
            assert!(map.copy_to(900, &mut narrow, map.place(17, 1)));
            assert!(map.widen_to(900, &mut wide, Place::NOWHERE));
            assert!((900..).zip(&narrow).all(|(expected, &word)| expected == word));
            assert!((900..).zip(&wide).all(|(expected, &word)| expected == word));
        }
    }

    #[test]
    fn a_file_cut_off_under_a_copy_is_no_signal() {
        let (file, map) = mapped(50_000);
        let mut row = [7; 3000];
        file.set_len(4096 * 4).unwrap();
        assert!(map.copy_to(10, &mut row, Place::NOWHERE), "what is left can still be read");
        assert!(!map.is_lost());
        assert!(!map.copy_to(40_000, &mut row, Place::NOWHERE));
        assert!(map.is_lost());
        assert!(!map.copy_to(10, &mut row, Place::NOWHERE), "nothing of a lost map is trusted");
        assert!(!map.widen_to(45_000, &mut [0; 100], Place::NOWHERE));
    }

    #[test]
    fn many_threads_lose_the_same_page_and_all_know() {
        let (file, map) = mapped(500_000);
        file.set_len(0).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert!(!map.copy_to(1000, &mut vec![0; 400_000], Place::NOWHERE)));
            }
        });
    }
}
