//! Shards that are not, or no longer, what the manifest says; and those that are.

use super::*;
use crate::mapping::Place;
use crate::options::Access;
use std::fs::{self, File};
use xxhash_rust::xxh3::xxh3_64;

struct Fixture {
    folder: tempfile::TempDir,
    facts: Vec<ShardFacts>,
}

impl Fixture {
    /// Shards of the given sizes; token n of shard s is `s * 1000 + n`.
    fn new(sizes: &[u32]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut facts = Vec::new();
        for (shard, &size) in (0_u32..).zip(sizes) {
            let words: Vec<u32> = (0..size).map(|n| shard * 1000 + n).collect();
            let bytes: &[u8] = bytemuck::cast_slice(&words);
            let file = format!("shard-{shard:05}.bin");
            fs::write(folder.path().join(&file), bytes).unwrap();
            let (words, xxh3) = (u64::from(size), Some(xxh3_64(bytes)));
            facts.push(ShardFacts { folder: 0, file: file.into(), words, xxh3 });
        }
        Self { folder, facts }
    }

    fn set(&self, options: Options) -> ShardSet {
        ShardSet::new(vec![self.folder.path().to_path_buf()], self.facts.clone(), options).unwrap()
    }

    fn path(&self, shard: usize) -> PathBuf {
        self.folder.path().join(&*self.facts[shard].file)
    }
}

fn both_ways(mut check: impl FnMut(Options)) {
    for access in [Access::Mmap, Access::Pread] {
        check(Options { access, recheck: Duration::ZERO, ..Options::default() });
    }
}

#[test]
fn rows_are_read_narrow_and_wide() {
    both_ways(|options| {
        let set = Fixture::new(&[50, 80]);
        let shard = set.set(options).get(1).unwrap();
        let (mut narrow, mut wide) = ([0; 3], [0; 3]);
        shard.read(77, &mut narrow, Place::NOWHERE).unwrap();
        shard.read_wide(77, &mut wide, Place::NOWHERE).unwrap();
        assert_eq!(narrow, [1077, 1078, 1079]);
        assert_eq!(wide, [1077, 1078, 1079]);
    });
}

#[test]
fn a_truncated_shard_is_an_error_of_the_open_one_and_of_the_next_one() {
    both_ways(|options| {
        let fixture = Fixture::new(&[50_000]);
        let set = fixture.set(options);
        let shard = set.get(0).unwrap();
        File::options().write(true).open(fixture.path(0)).unwrap().set_len(100).unwrap();
        let mut row = [0; 10];
        assert!(matches!(shard.read(49_000, &mut row, Place::NOWHERE), Err(Error::Changed { .. })));
        assert!(matches!(shard.populate(49_000, 10), Err(Error::Changed { .. }) | Ok(())));
        assert!(matches!(set.get(0), Err(Error::Size { found: 100, .. })));
    });
}

#[test]
fn zeros_behind_the_end_of_a_shortened_shard_are_no_tokens() {
    both_ways(|options| {
        let fixture = Fixture::new(&[50_000]);
        let set = fixture.set(options);
        let shard = set.get(0).unwrap();
        let (mut row, mut wide) = ([7; 20], [7; 20]);
        shard.read(48_995, &mut row, Place::NOWHERE).unwrap();
        // The cut is on the page that the row ends on, so nothing of it faults.
        File::options().write(true).open(fixture.path(0)).unwrap().set_len(49_000 * 4).unwrap();
        assert!(shard.read(48_995, &mut row, Place::NOWHERE).is_err());
        assert!(shard.read_wide(48_995, &mut wide, Place::NOWHERE).is_err());
        shard.read(48_980, &mut row, Place::NOWHERE).unwrap();
        assert_eq!(row[19], 48_999);
    });
}

#[test]
fn a_replaced_shard_is_judged_by_its_content() {
    both_ways(|options| {
        let fixture = Fixture::new(&[50]);
        let set = fixture.set(options);
        let content = fs::read(fixture.path(0)).unwrap();
        let old = set.get(0).unwrap();
        for (content, fits) in [(content, true), (vec![0; 200], false)] {
            let fresh = fixture.folder.path().join("fresh");
            fs::write(&fresh, content).unwrap();
            fs::rename(&fresh, fixture.path(0)).unwrap();
            assert_eq!(set.get(0).is_ok(), fits);
        }
        let mut row = [0; 2];
        old.read(48, &mut row, Place::NOWHERE).unwrap();
        assert_eq!(row, [48, 49], "the replaced file lives on for those who hold it");
    });
}

#[test]
fn without_a_hash_a_replaced_shard_is_refused() {
    let mut fixture = Fixture::new(&[50]);
    fixture.facts[0].xxh3 = None;
    let set = fixture.set(Options { recheck: Duration::ZERO, ..Options::default() });
    set.get(0).unwrap();
    fs::remove_file(fixture.path(0)).unwrap();
    fs::write(fixture.path(0), vec![0; 200]).unwrap();
    assert!(matches!(set.get(0), Err(Error::Changed { .. })));
}

#[test]
fn a_wrong_hash_is_an_error_unless_nobody_looks() {
    let mut fixture = Fixture::new(&[50]);
    fixture.facts[0].xxh3 = Some(1);
    let folders = vec![fixture.folder.path().to_path_buf()];
    let open = Options { verify: Verify::Open, ..Options::default() };
    assert!(matches!(ShardSet::new(folders, fixture.facts.clone(), open), Err(Error::Hash { .. })));
    assert!(matches!(fixture.set(Options::default()).get(0), Err(Error::Hash { expected: 1, .. })));
    assert!(fixture.set(Options { verify: Verify::Off, ..Options::default() }).get(0).is_ok());
}

#[test]
fn the_least_recently_used_shard_makes_room() {
    let fixture = Fixture::new(&[50; 4]);
    let set = fixture.set(Options { max_open: 2, ..Options::default() });
    for index in [0, 1, 0, 2, 0, 3] {
        set.get(index).unwrap();
        assert!(set.open_count().unwrap() <= 2);
    }
    let opened = set.counters.opened.load(Ordering::Relaxed);
    set.get(0).unwrap();
    assert_eq!(set.counters.opened.load(Ordering::Relaxed), opened, "0 was used most recently but one");
    assert_eq!(opened, 4);
    assert_eq!(set.counters.verified.load(Ordering::Relaxed), 4);
}

#[test]
fn a_view_holds_its_map_when_the_set_is_gone() {
    let fixture = Fixture::new(&[50]);
    let set = fixture.set(Options::default());
    let shard = set.get(0).unwrap();
    let held = Arc::downgrade(&shard);
    let view = shard.view(10, 5).unwrap().unwrap();
    drop(set);
    let mut row = [0; 5];
    held.upgrade().unwrap().read(10, &mut row, Place::NOWHERE).unwrap();
    assert_eq!(row, [10, 11, 12, 13, 14]);
    assert!(!view.pointer().is_null());
    drop(view);
    assert!(held.upgrade().is_none());
}

#[test]
fn rows_read_with_pread_have_no_views() {
    let fixture = Fixture::new(&[50]);
    let set = fixture.set(Options { access: Access::Pread, ..Options::default() });
    assert!(set.get(0).unwrap().view(0, 5).unwrap().is_none());
}

#[test]
fn a_missing_shard_and_a_folder_in_its_place_are_errors() {
    let fixture = Fixture::new(&[50, 50]);
    fs::remove_file(fixture.path(0)).unwrap();
    fs::remove_file(fixture.path(1)).unwrap();
    fs::create_dir(fixture.path(1)).unwrap();
    let set = fixture.set(Options::default());
    assert!(matches!(set.get(0), Err(Error::Missing { .. })));
    assert!(set.get(1).is_err());
}

#[test]
fn a_shard_overwritten_under_its_old_time_is_noticed() {
    for verify in [Verify::FirstTouch, Verify::Off] {
        both_ways(|options| {
            let fixture = Fixture::new(&[50]);
            let set = fixture.set(Options { verify, ..options });
            set.get(0).unwrap();
            let file = File::options().write(true).open(fixture.path(0)).unwrap();
            let time = file.metadata().unwrap().modified().unwrap();
            let content = fs::read(fixture.path(0)).unwrap();
            let counted = set.counters.verified.load(Ordering::Relaxed);
            for (first, fits) in [(content[0], true), (content[0] ^ 1, false)] {
                std::thread::sleep(Duration::from_millis(20)); // the grain of the clock of the file system
                std::os::unix::fs::FileExt::write_all_at(&file, &[first], 0).unwrap();
                file.set_modified(time).unwrap();
                assert_eq!(set.get(0).is_ok(), fits);
            }
            assert!(set.counters.verified.load(Ordering::Relaxed) > counted);
        });
    }
}

#[test]
fn what_one_process_verified_another_believes_until_it_changes() {
    let fixture = Fixture::new(&[50, 60]);
    let marks = fixture.folder.path().join("verified");
    let open = |settle| {
        let verified = Some(Arc::new(crate::verified::Verified::open(&marks, settle).unwrap()));
        fixture.set(Options { verified, recheck: Duration::ZERO, ..Options::default() })
    };
    let counted = |set: &ShardSet| set.counters.verified.load(Ordering::Relaxed);
    let doubting = open(Duration::from_secs(3600));
    doubting.get(0).unwrap();
    assert_eq!(fs::metadata(&marks).unwrap().len(), 0, "changed too lately to be remembered");
    let later = std::time::Instant::now() + Duration::from_millis(2100);
    while std::time::Instant::now() < later {
        std::thread::sleep(Duration::from_millis(50));
    }
    let (first, second) = (open(Duration::ZERO), open(Duration::ZERO));
    first.get(0).unwrap();
    second.get(0).unwrap();
    second.get(1).unwrap();
    first.get(1).unwrap();
    assert_eq!((counted(&first), counted(&second)), (1, 1));
    fs::write(fixture.path(0), vec![0; 200]).unwrap();
    assert!(matches!(open(Duration::ZERO).get(0), Err(Error::Hash { .. })));
    let wary = Options { verify: Verify::Open, ..open(Duration::ZERO).options().clone() };
    assert!(ShardSet::new(vec![fixture.folder.path().to_path_buf()], fixture.facts.clone(), wary).is_err());
}

#[test]
fn the_shards_used_lately_stay_open() {
    let fixture = Fixture::new(&[4; 300]);
    let set = fixture.set(Options { max_open: 100, ..Options::default() });
    for index in 0..300 {
        set.get(index).unwrap();
        set.get(7).unwrap();
        assert!(set.open_count().unwrap() <= 100);
    }
    let opened = set.counters.opened.load(Ordering::Relaxed);
    set.get(7).unwrap();
    set.get(299).unwrap();
    assert_eq!(set.counters.opened.load(Ordering::Relaxed), opened);
}
