//! The shard list of a manifest, kept without a Python object a shard.
//!
//! The rest of the manifest is handed back as JSON: what its keys mean is Python's business.

use std::collections::HashSet;
use std::fmt::{self, Display, Formatter};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, open, statat};
use serde::de::{Deserializer, Error, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Shards looked at by one thread, at least: fewer are not worth starting one for.
const SHARDS_PER_THREAD: usize = 4096;

/// One shard as a manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Line {
    /// Plain file name.
    #[serde(deserialize_with = "plain_name")]
    pub file: Box<str>,
    /// Number of ids.
    pub tokens: u64,
    /// Size of the file.
    pub bytes: u64,
    /// xxh3-64 of the file.
    pub xxh3_64: Option<Hex<1>>,
    /// SHA-256 of the file.
    pub sha256: Option<Hex<4>>,
    /// Smallest id.
    pub min_id: Option<u32>,
    /// Largest id.
    pub max_id: Option<u32>,
    /// Documents that begin in it.
    pub documents: Option<u64>,
    /// xxh3-64 of the sidecar of document starts.
    pub index_xxh3_64: Option<Hex<1>>,
    /// xxh3-64 of the sidecar of document fingerprints.
    pub fingerprints_xxh3_64: Option<Hex<1>>,
    /// Of a flagged shard: tokens that are targets.
    pub targets: Option<u64>,
}

/// A number of 16 lower-case hexadecimal digits a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hex<const WORDS: usize>(pub [u64; WORDS]);

impl<const WORDS: usize> Display for Hex<WORDS> {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|word| write!(formatter, "{word:016x}"))
    }
}

struct HexVisitor<const WORDS: usize>;

impl<const WORDS: usize> Visitor<'_> for HexVisitor<WORDS> {
    type Value = Hex<WORDS>;

    fn expecting(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} lower-case hexadecimal digits", 16 * WORDS)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        let wrong = || E::invalid_value(Unexpected::Str(text), &self);
        if text.len() != 16 * WORDS {
            return Err(wrong());
        }
        let mut words = [0_u64; WORDS];
        for (at, digit) in text.bytes().enumerate() {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return Err(wrong()),
            };
            words[at / 16] = words[at / 16] << 4 | u64::from(value);
        }
        Ok(Hex(words))
    }
}

impl<'de, const WORDS: usize> Deserialize<'de> for Hex<WORDS> {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        source.deserialize_str(HexVisitor)
    }
}

fn plain_name<'de, D: Deserializer<'de>>(source: D) -> Result<Box<str>, D::Error> {
    let name = Box::<str>::deserialize(source)?;
    let plain = !name.contains(['/', '\\', '\0']) && !["", ".", ".."].contains(&&*name) && name.len() < 256;
    if plain {
        return Ok(name);
    }
    let expected = "plain file names inside the folder, without separators or `..`";
    Err(D::Error::invalid_value(Unexpected::Str(&name), &expected))
}

/// A manifest: its shards, None when it lists none, and its other keys.
#[derive(Debug, Serialize)]
pub struct Recorded {
    /// Every key but `shards`.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
    /// The list under `shards`.
    #[serde(skip)]
    pub lines: Option<Vec<Line>>,
}

struct RecordedVisitor;

impl<'de> Visitor<'de> for RecordedVisitor {
    type Value = Recorded;

    fn expecting(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Recorded, M::Error> {
        let mut recorded = Recorded { rest: Map::new(), lines: None };
        while let Some(key) = map.next_key::<String>()? {
            if key == "shards" {
                recorded.lines = map.next_value()?;
            } else if recorded.rest.insert(key.clone(), map.next_value()?).is_some() {
                return Err(M::Error::custom(format_args!("the key {key:?} occurs twice")));
            }
        }
        Ok(recorded)
    }
}

impl<'de> Deserialize<'de> for Recorded {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        source.deserialize_map(RecordedVisitor)
    }
}

/// Reads a manifest; the error names the key and says what is wrong with it.
pub fn parse(content: &[u8]) -> Result<Recorded, String> {
    // Which key is at fault is only worked out when one is: keeping track of it takes time.
    serde_json::from_slice(content).map_err(|error| located(content, &error))
}

/// The first name that stands in the list twice.
#[must_use]
pub fn listed_twice(lines: &[Line]) -> Option<&str> {
    if lines.windows(2).all(|pair| pair[0].file < pair[1].file) {
        return None;
    }
    let mut seen = HashSet::with_capacity(lines.len());
    lines.iter().find(|line| !seen.insert(&line.file)).map(|line| &*line.file)
}

fn located(content: &[u8], error: &serde_json::Error) -> String {
    let mut source = serde_json::Deserializer::from_slice(content);
    match serde_path_to_error::deserialize::<_, Recorded>(&mut source) {
        Err(found) if found.path().iter().len() > 0 => {
            format!("{}: {}", found.path().to_string().replace('[', ".").replace(']', ""), found.inner())
        }
        _ => error.to_string(),
    }
}

/// The first shard that is not a regular file (no link) of its size in `folder`: its index, and the size
/// found, None where there is no such file.
#[must_use]
pub fn first_misfit(folder: &Path, lines: &[Line]) -> Option<(usize, Option<u64>)> {
    let Ok(folder) = open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) else {
        return lines.first().map(|_| (0, None));
    };
    let misfit = |line: &Line| match statat(&folder, &*line.file, AtFlags::SYMLINK_NOFOLLOW) {
        Err(_) => Some(None),
        Ok(found) => {
            let size = u64::try_from(found.st_size).unwrap_or(0);
            let fits = FileType::from_raw_mode(found.st_mode).is_file() && size == line.bytes;
            (!fits).then_some(Some(size))
        }
    };
    let find = |part: &[Line]| part.iter().enumerate().find_map(|(at, line)| Some((at, misfit(line)?)));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let part = lines.len().div_ceil(threads).max(SHARDS_PER_THREAD);
    std::thread::scope(|scope| {
        let others: Vec<_> = lines.chunks(part).skip(1).map(|part| scope.spawn(move || find(part))).collect();
        let first = lines.chunks(part).next().and_then(find);
        let behind = (1..).zip(others).map(|(number, other)| {
            let found = other.join().unwrap_or(Some((0, None)));
            found.map(|(at, size)| (number * part + at, size))
        });
        std::iter::once(first).chain(behind).collect::<Vec<_>>().into_iter().flatten().next()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "{\"file\": \"a.bin\", \"tokens\": 3, \"bytes\": 12, \"xxh3_64\": \"00000000000000ff\", \
                        \"sha256\": null, \"min_id\": 0, \"max_id\": 4294967295, \"documents\": null}";

    fn written(lines: &[String]) -> Vec<u8> {
        format!("{{\"schema\": \"x\", \"shards\": [{}], \"split\": null}}", lines.join(",\n")).into_bytes()
    }

    fn lines(content: &[u8]) -> Vec<Line> {
        parse(content).unwrap().lines.unwrap()
    }

    #[test]
    fn shards_are_read_and_the_other_keys_are_handed_back() {
        let recorded = parse(&written(&[LINE.into(), LINE.replace("a.bin", "b.bin")])).unwrap();
        assert_eq!(serde_json::to_string(&recorded).unwrap(), r#"{"schema":"x","split":null}"#);
        let lines = recorded.lines.unwrap();
        assert_eq!(lines.iter().map(|line| &*line.file).collect::<Vec<_>>(), ["a.bin", "b.bin"]);
        assert_eq!(
            (lines[1].tokens, lines[1].xxh3_64, lines[1].max_id),
            (3, Some(Hex([255])), Some(u32::MAX))
        );
        assert_eq!((lines[1].sha256, lines[1].documents, lines[1].index_xxh3_64), (None, None, None));
    }

    #[test]
    fn no_list_is_not_an_empty_list() {
        assert_eq!(parse(b"{}").unwrap().lines, None);
        assert_eq!(parse(b"{\"shards\": null}").unwrap().lines, None);
        assert_eq!(parse(b"{\"shards\": []}").unwrap().lines, Some(vec![]));
    }

    #[test]
    fn a_hash_is_written_as_it_was_read() {
        let digits = "0123456789abcdef".repeat(4);
        let found = lines(&written(&[LINE
            .replace("null", &format!("\"{digits}\""))
            .replace(&format!("\"documents\": \"{digits}\""), "\"documents\": 1")]));
        assert_eq!(found[0].sha256.unwrap().to_string(), digits);
    }

    #[test]
    fn whatever_is_malformed_is_named() {
        for (from, to, said) in [
            ("a.bin", "../a", "shards.0.file"),
            ("a.bin", "..", "shards.0.file"),
            ("a.bin", "", "shards.0.file"),
            ("a.bin", "a\\u0000", "shards.0.file"),
            (": 3,", ": 03,", "shards.0.tokens"),
            (": 3,", ": -3,", "shards.0.tokens"),
            (": 3,", ": 3.0,", "shards.0.tokens"),
            (": 3,", ": 99999999999999999999,", "shards.0.tokens"),
            (": 3,", ": \"3\",", "shards.0.tokens"),
            (": 3,", ": null,", "shards.0.tokens"),
            ("4294967295", "4294967296", "shards.0.max_id"),
            ("00ff", "00FF", "shards.0.xxh3_64"),
            ("00ff", "0ff", "shards.0.xxh3_64"),
            ("00ff", "0\u{e9}f", "shards.0.xxh3_64"),
            ("\"tokens\": 3, ", "", "missing field `tokens`"),
            ("null}", "null, \"tokens\": 3}", "duplicate field `tokens`"),
        ] {
            assert_ne!(LINE, LINE.replace(from, to));
            let error = parse(&written(&[LINE.replace(from, to)])).unwrap_err();
            assert!(error.contains(said), "{to}: {error}");
        }
        assert_eq!(listed_twice(&lines(&written(&[LINE.into(), LINE.into()]))), Some("a.bin"));
        assert!(parse(&written(&[LINE.into()])[..150]).is_err());
        assert!(parse(b"[]").is_err());
        assert!(parse(b"{\"a\": 1, \"a\": 2}").unwrap_err().contains("twice"));
    }

    #[test]
    fn a_missing_a_longer_and_a_linked_file_do_not_fit() {
        let folder = tempfile::tempdir().unwrap();
        let count = SHARDS_PER_THREAD + 10;
        let names = (0..count).map(|n| format!("{n:05}.bin"));
        let lines: Vec<_> = names.map(|name| LINE.replace("a.bin", &name)).collect();
        let lines = super::tests::lines(&written(&lines));
        for line in &lines {
            std::fs::write(folder.path().join(&*line.file), [0; 12]).unwrap();
        }
        assert_eq!(first_misfit(folder.path(), &lines), None);
        for odd in [0, count - 1] {
            let path = folder.path().join(&*lines[odd].file);
            std::fs::write(&path, [0; 13]).unwrap();
            assert_eq!(first_misfit(folder.path(), &lines), Some((odd, Some(13))));
            std::fs::remove_file(&path).unwrap();
            assert_eq!(first_misfit(folder.path(), &lines), Some((odd, None)));
            std::os::unix::fs::symlink(folder.path().join(&*lines[1].file), &path).unwrap();
            assert!(matches!(first_misfit(folder.path(), &lines), Some((at, Some(_))) if at == odd));
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, [0; 12]).unwrap();
        }
        assert_eq!(first_misfit(folder.path(), &lines), None);
    }
}
