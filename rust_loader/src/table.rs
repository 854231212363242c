//! The shard list of a manifest in its writer's own layout, one shard a line, kept without an object a shard.
//!
//! Not a JSON parser: whatever is not written exactly so is left to one, which also words the errors.

use std::collections::HashSet;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, open, statat};

const BEGIN: &[u8] = b",\n \"shards\": [\n";
const END: &[u8] = b"\n ]\n}\n";

/// Shards looked at by one thread, at least: fewer are not worth starting one for.
const SHARDS_PER_THREAD: usize = 4096;

/// Bytes of a list read by one thread, at least.
const BYTES_PER_THREAD: usize = 1 << 20;

/// One line of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Plain file name, ASCII.
    pub file: Box<str>,
    /// Number of ids.
    pub tokens: u64,
    /// Size of the file.
    pub bytes: u64,
    /// xxh3-64 of the file.
    pub xxh3: Option<u64>,
    /// SHA-256 of the file.
    pub sha256: Option<[u64; 4]>,
    /// Smallest id.
    pub min_id: Option<u32>,
    /// Largest id.
    pub max_id: Option<u32>,
    /// Documents that begin in it.
    pub documents: Option<u64>,
    /// xxh3-64 of the sidecar of document starts.
    pub index_xxh3: Option<u64>,
}

/// Takes `content` apart: the length of what stands before the first shard, and the shards.
///
/// None when the list is not in the writer's layout, holds no shard, a number or a name out of bounds,
/// or a name twice.
#[must_use]
pub fn parse(content: &[u8]) -> Option<(usize, Vec<Line>)> {
    let head = content.windows(BEGIN.len()).position(|part| part == BEGIN)? + BEGIN.len() - 1;
    let list = content.get(head + 1..)?.strip_suffix(END)?;
    let parts = split(list);
    let (first, others) = parts.split_first()?;
    let lines = std::thread::scope(|scope| {
        let others: Vec<_> = others.iter().map(|part| scope.spawn(move || read(part))).collect();
        let mut lines = read(first)?;
        for other in others {
            lines.append(&mut other.join().ok()??);
        }
        Some(lines)
    })?;
    let rising = lines.windows(2).all(|pair| pair[0].file < pair[1].file);
    let distinct = || lines.iter().map(|line| &line.file).collect::<HashSet<_>>().len() == lines.len();
    (rising || distinct()).then_some((head, lines))
}

/// Cuts a list between lines, a part a processor: a line holds no newline, whatever is wrong with it.
fn split(list: &[u8]) -> Vec<&[u8]> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let size = list.len().div_ceil(threads).max(BYTES_PER_THREAD);
    let (mut parts, mut rest) = (Vec::new(), list);
    while rest.len() > size {
        let Some(end) = rest[size..].windows(2).position(|pair| pair == b",\n") else { break };
        let (part, behind) = rest.split_at(size + end);
        parts.push(part);
        rest = &behind[2..];
    }
    parts.push(rest);
    parts
}

/// The lines of one part.
fn read(part: &[u8]) -> Option<Vec<Line>> {
    let mut lines = Vec::with_capacity(part.len() / 200);
    let mut rest = Text(part);
    loop {
        lines.push(rest.line()?);
        if rest.0.is_empty() {
            return Some(lines);
        }
        rest.literal(b",\n")?;
    }
}

/// What is left to be read of a list.
struct Text<'a>(&'a [u8]);

impl<'a> Text<'a> {
    fn line(&mut self) -> Option<Line> {
        Some(Line {
            file: self.after(b"  {\"file\": \"")?.name()?,
            tokens: self.after(b", \"tokens\": ")?.number()?,
            bytes: self.after(b", \"bytes\": ")?.number()?,
            xxh3: self.after(b", \"xxh3_64\": ")?.or_null(|text| Some(text.hex::<1>()?[0]))?,
            sha256: self.after(b", \"sha256\": ")?.or_null(Self::hex)?,
            min_id: self.after(b", \"min_id\": ")?.or_null(Self::id)?,
            max_id: self.after(b", \"max_id\": ")?.or_null(Self::id)?,
            documents: self.after(b", \"documents\": ")?.or_null(Self::number)?,
            index_xxh3: self.after(b", \"index_xxh3_64\": ")?.or_null(|text| Some(text.hex::<1>()?[0]))?,
        })
        .filter(|_| self.literal(b"}").is_some())
    }

    fn literal(&mut self, expected: &[u8]) -> Option<()> {
        self.0 = self.0.strip_prefix(expected)?;
        Some(())
    }

    fn after(&mut self, expected: &[u8]) -> Option<&mut Self> {
        self.literal(expected)?;
        Some(self)
    }

    #[allow(clippy::option_option, reason = "malformed, or null, or a value")]
    fn or_null<T>(&mut self, read: impl Fn(&mut Self) -> Option<T>) -> Option<Option<T>> {
        if self.literal(b"null").is_some() { Some(None) } else { read(self).map(Some) }
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// A name up to its closing quote: printable ASCII without escapes or separators.
    fn name(&mut self) -> Option<Box<str>> {
        let length = self.0.iter().take(256).position(|&byte| byte == b'"')?;
        let name = std::str::from_utf8(self.take(length)?).ok()?;
        self.literal(b"\"")?;
        let plain = name.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'/' && byte != b'\\');
        (plain && !["", ".", ".."].contains(&name)).then(|| name.into())
    }

    fn number(&mut self) -> Option<u64> {
        let length = self.0.iter().take(20).position(|byte| !byte.is_ascii_digit())?;
        let digits = self.take(length)?;
        if digits.is_empty() || (digits[0] == b'0' && digits.len() > 1) {
            return None;
        }
        Some(digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
    }

    fn id(&mut self) -> Option<u32> {
        u32::try_from(self.number()?).ok()
    }

    /// A quoted string of 16 lower-case digits a word.
    fn hex<const WORDS: usize>(&mut self) -> Option<[u64; WORDS]> {
        self.literal(b"\"")?;
        let mut words = [0; WORDS];
        for word in &mut words {
            for &digit in self.take(16)? {
                let value = match digit {
                    b'0'..=b'9' => digit - b'0',
                    b'a'..=b'f' => digit - b'a' + 10,
                    _ => return None,
                };
                *word = *word << 4 | u64::from(value);
            }
        }
        self.literal(b"\"")?;
        Some(words)
    }
}

/// Whether every shard in `folder` is a regular file (no link) of its size, in whole tokens.
#[must_use]
pub fn all_fit(folder: &Path, lines: &[Line]) -> bool {
    let Ok(folder) = open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) else {
        return false;
    };
    let fits = |line: &Line| {
        let found = statat(&folder, &*line.file, AtFlags::SYMLINK_NOFOLLOW);
        line.tokens.checked_mul(4) == Some(line.bytes)
            && found.is_ok_and(|found| {
                FileType::from_raw_mode(found.st_mode).is_file()
                    && u64::try_from(found.st_size).is_ok_and(|size| size == line.bytes)
            })
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let part = lines.len().div_ceil(threads).max(SHARDS_PER_THREAD);
    std::thread::scope(|scope| {
        let parts = lines.chunks(part).skip(1);
        let others: Vec<_> = parts.map(|part| scope.spawn(move || part.iter().all(fits))).collect();
        let first = lines.iter().take(part).all(fits);
        others.into_iter().fold(first, |all, other| all & other.join().unwrap_or(false))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "  {\"file\": \"a.bin\", \"tokens\": 3, \"bytes\": 12, \"xxh3_64\": \"00000000000000ff\", \
                        \"sha256\": null, \"min_id\": 0, \"max_id\": 4294967295, \"documents\": null, \
                        \"index_xxh3_64\": null}";

    fn written(lines: &[String]) -> Vec<u8> {
        format!("{{\n \"schema\": \"x\",\n \"shards\": [\n{}\n ]\n}}\n", lines.join(",\n")).into_bytes()
    }

    #[test]
    fn the_writers_layout_is_read() {
        let content = written(&[LINE.into(), LINE.replace("a.bin", "b.bin")]);
        let (head, lines) = parse(&content).unwrap();
        assert!(content[..head].ends_with(b"\"shards\": ["));
        assert_eq!(lines.iter().map(|line| &*line.file).collect::<Vec<_>>(), ["a.bin", "b.bin"]);
        assert_eq!((lines[1].tokens, lines[1].xxh3, lines[1].max_id), (3, Some(255), Some(u32::MAX)));
        assert_eq!((lines[1].sha256, lines[1].documents), (None, None));
    }

    #[test]
    fn a_long_list_is_read_in_parts_that_meet() {
        let line = |n: usize| LINE.replace("a.bin", &format!("{n:06}.bin"));
        let count = 3 * BYTES_PER_THREAD / LINE.len();
        let lines: Vec<_> = (0..count).map(line).collect();
        assert!(split(written(&lines).as_slice()).len() <= 4);
        let (_, found) = parse(&written(&lines)).unwrap();
        assert_eq!(found.len(), count);
        assert!((0..).zip(&found).all(|(n, line)| *line.file == *format!("{n:06}.bin")));
        for wrong in [count / 3, count / 2, count - 1] {
            let mut lines = lines.clone();
            lines[wrong] = lines[wrong].replace(": 3,", ": 3 ,");
            assert_eq!(parse(&written(&lines)), None);
            lines[wrong] = lines[0].clone();
            assert_eq!(parse(&written(&lines)), None, "a name twice, in two parts");
        }
    }

    #[test]
    fn anything_else_is_left_to_the_strict_reader() {
        for (from, to) in [
            ("a.bin", "../a"),
            ("a.bin", ".."),
            ("a.bin", ""),
            ("a.bin", "\\u0061"),
            ("a.bin", "\u{e9}"),
            (": 3,", ": 03,"),
            (": 3,", ": -3,"),
            (": 3,", ": 3.0,"),
            (": 3,", ": 99999999999999999999,"),
            (": 3,", ": \"3\","),
            (": 3,", ": null,"),
            ("4294967295", "4294967296"),
            ("00ff", "00FF"),
            ("00ff", "0ff"),
            ("null}", "null, \"more\": 1}"),
            ("  {", " {"),
        ] {
            assert_ne!(LINE, LINE.replace(from, to));
            assert_eq!(parse(&written(&[LINE.replace(from, to)])), None, "{to}");
        }
        assert_eq!(parse(&written(&[LINE.into(), LINE.into()])), None);
        assert_eq!(parse(&written(&[])), None);
        assert_eq!(parse(&written(&[LINE.into()])[..200]), None);
    }

    #[test]
    fn a_missing_a_longer_and_a_linked_file_do_not_fit() {
        let folder = tempfile::tempdir().unwrap();
        let count = SHARDS_PER_THREAD + 10;
        let names = (0..count).map(|n| format!("{n:05}.bin"));
        let lines: Vec<_> = names.map(|name| LINE.replace("a.bin", &name)).collect();
        let (_, lines) = parse(&written(&lines)).unwrap();
        for line in &lines {
            std::fs::write(folder.path().join(&*line.file), [0; 12]).unwrap();
        }
        assert!(all_fit(folder.path(), &lines));
        for odd in [0, count - 1] {
            let path = folder.path().join(&*lines[odd].file);
            std::fs::write(&path, [0; 13]).unwrap();
            assert!(!all_fit(folder.path(), &lines));
            std::fs::remove_file(&path).unwrap();
            assert!(!all_fit(folder.path(), &lines));
            std::os::unix::fs::symlink(folder.path().join(&*lines[1].file), &path).unwrap();
            assert!(!all_fit(folder.path(), &lines));
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, [0; 12]).unwrap();
        }
        assert!(all_fit(folder.path(), &lines));
    }
}
