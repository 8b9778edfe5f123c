//! What must hold over all machines at once. Each check is a function with the sentence that it
//! proves; each panics with what it found.

use super::settings::{DATABASE_COUNT, Machine, Mutation, REPLICA_COUNT};
use super::{World, node_index};
use durovfs_journal::DatabaseState;
use durovfs_quorum::holds_quorum;
use durovfs_wire::entry::{CommitHeader, Origin, SlotPages, TransactionSummary};
use durovfs_wire::peer::ReplicaMessage;
use durovfs_wire::{
    DatabaseChecksum, EntryPart, Epoch, LogPosition, Lsn, Member, Membership, PageChecksum, PageNo,
    PartKind,
};
use std::collections::{BTreeMap, BTreeSet};

/// A database's pages.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Image {
    pages: BTreeMap<u32, Vec<u8>>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "image {}", self.checksum())
    }
}

impl Image {
    /// Puts a page in.
    pub fn set(&mut self, page: u32, bytes: Vec<u8>) {
        self.pages.insert(page, bytes);
    }

    /// Its checksum, from its pages.
    pub fn checksum(&self) -> DatabaseChecksum {
        let mut checksum = DatabaseChecksum::EMPTY;
        for (page, bytes) in &self.pages {
            if let Some(page_no) = PageNo::new(*page) {
                checksum.toggle(PageChecksum::of(page_no, bytes));
            }
        }
        checksum
    }

    /// Applies entries, part by part.
    pub fn apply<'a>(&mut self, parts: impl IntoIterator<Item = &'a EntryPart>) {
        for part in parts {
            for (page, bytes) in pages_of(part) {
                self.set(page, bytes);
            }
        }
    }
}

/// The pages of a part; the slots of this world's transactions rise, so the last one counts.
fn pages_of(part: &EntryPart) -> Vec<(u32, Vec<u8>)> {
    let slots = SlotPages::parse(&part.payload, part.header.page_size());
    slots.map_or_else(
        |error| panic!("bad payload of {}: {error}", part.header.position()),
        |slots| {
            slots
                .map(|slot| (slot.page_no.get(), slot.image.to_vec()))
                .collect()
        },
    )
}

/// An entry as its primary made it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Created {
    commit: Option<CommitHeader>,
    parts: Vec<EntryPart>,
}

/// What is known of one log.
#[derive(Debug, Default)]
struct Facts {
    staged: BTreeMap<LogPosition, Vec<EntryPart>>,
    created: BTreeMap<LogPosition, Created>,
    committed: BTreeMap<Lsn, LogPosition>,
    origins: BTreeMap<(u128, u64), Lsn>,
    refused: BTreeSet<(u128, u64)>,
    archive: BTreeMap<Lsn, Vec<EntryPart>>,
    /// The model: the image after each committed entry.
    images: BTreeMap<Lsn, Image>,
}

fn key(origin: Origin) -> (u128, u64) {
    (
        u128::from_le_bytes(*origin.client.as_bytes()),
        origin.sequence,
    )
}

/// What was ever created, committed, told and archived.
#[derive(Debug)]
pub struct Checker {
    facts: Vec<Facts>,
    ladders: BTreeMap<(Machine, u64, usize), (Epoch, Lsn)>,
}

impl Checker {
    pub fn new() -> Self {
        Self {
            facts: (0..DATABASE_COUNT).map(|_| Facts::default()).collect(),
            ladders: BTreeMap::new(),
        }
    }

    /// Notes a part that is not the last of its entry.
    pub fn stage(&mut self, database: usize, part: &EntryPart) {
        let staged = &mut self.facts[database].staged;
        let parts = staged.entry(part.header.position()).or_default();
        if part.header.part == 0 {
            parts.clear();
        }
        parts.push(part.clone());
    }

    /// A position of the log is one entry: no two are ever made for it.
    pub fn create(&mut self, database: usize, last: &EntryPart) {
        let facts = &mut self.facts[database];
        let position = last.header.position();
        let mut parts = facts.staged.remove(&position).unwrap_or_default();
        parts.push(last.clone());
        let commit = match last.header.kind {
            PartKind::Commit(commit) => Some(commit),
            _ => None,
        };
        let created = Created { commit, parts };
        let earlier = facts.created.insert(position, created.clone());
        assert!(
            earlier.as_ref().is_none_or(|earlier| *earlier == created),
            "database {database}: two entries were made at {position}"
        );
    }

    /// One entry per lsn is ever committed; none that was told to be not committed is; and no
    /// commit is there twice.
    pub fn commit(&mut self, database: usize, positions: &[LogPosition]) {
        let facts = &mut self.facts[database];
        for position in positions {
            let first = *facts.committed.entry(position.lsn).or_insert(*position);
            assert_eq!(
                first, *position,
                "database {database}: two entries are committed at lsn {}",
                position.lsn
            );
            let Some(created) = facts.created.get(position) else {
                panic!("database {database}: {position} is committed, and nobody made it");
            };
            if let Some(commit) = created.commit {
                let origin = key(commit.origin);
                assert!(
                    !facts.refused.contains(&origin),
                    "database {database}: {:?} was told to be not committed, and is at {position}",
                    commit.origin
                );
                let earlier = facts.origins.insert(origin, position.lsn);
                assert!(
                    earlier.is_none_or(|lsn| lsn == position.lsn),
                    "database {database}: {:?} is committed at lsn {earlier:?} and at {position}",
                    commit.origin
                );
            }
        }
        facts.extend_model(database);
    }

    /// A commit that is acked is committed, where the ack says.
    pub fn ack(&self, database: usize, origin: Origin, position: LogPosition) {
        let facts = &self.facts[database];
        assert_eq!(
            facts.origins.get(&key(origin)),
            Some(&position.lsn),
            "database {database}: {origin:?} was acked at {position}, and is not committed there"
        );
        assert_eq!(facts.committed.get(&position.lsn), Some(&position));
    }

    /// What is told to be not committed is not committed, before or after.
    pub fn refuse(&mut self, database: usize, origin: Origin) {
        let facts = &mut self.facts[database];
        assert!(
            !facts.origins.contains_key(&key(origin)),
            "database {database}: {origin:?} is told to be not committed, and is committed"
        );
        facts.refused.insert(key(origin));
    }

    /// What is archived is committed, whole, and without a gap.
    pub fn archive(&mut self, database: usize, parts: &[EntryPart]) {
        let facts = &mut self.facts[database];
        let mut entries: BTreeMap<Lsn, Vec<EntryPart>> = BTreeMap::new();
        for part in parts {
            entries
                .entry(part.header.lsn)
                .or_default()
                .push(part.clone());
        }
        for (lsn, parts) in entries {
            let position = parts[0].header.position();
            assert_eq!(
                facts.committed.get(&lsn),
                Some(&position),
                "database {database}: {position} is archived, and not committed"
            );
            assert_eq!(
                facts.created.get(&position).map(|created| &created.parts),
                Some(&parts),
                "database {database}: {position} is archived with other contents"
            );
            let before = lsn.previous().unwrap_or(Lsn::ZERO);
            assert!(
                before == Lsn::ZERO || facts.archive.contains_key(&before),
                "database {database}: the archive lacks lsn {before}"
            );
            facts.archive.insert(lsn, parts);
        }
    }

    /// Archived parts of a range.
    pub fn archived(
        &self,
        database: usize,
        first_lsn: Lsn,
        last_lsn: Lsn,
    ) -> impl Iterator<Item = &EntryPart> {
        let count = last_lsn.get() + 1 - first_lsn.get();
        let archive = &self.facts[database].archive;
        let held = archive.range(first_lsn..=last_lsn).count() as u64;
        assert_eq!(
            held, count,
            "database {database}: the archive lacks entries of lsn {first_lsn} to {last_lsn}"
        );
        archive.range(first_lsn..=last_lsn).flat_map(|(_, p)| p)
    }

    /// The last archived transaction through an entry.
    pub fn archived_transaction(
        &self,
        database: usize,
        through_lsn: Lsn,
    ) -> Option<TransactionSummary> {
        let archive = &self.facts[database].archive;
        assert!(
            archive.contains_key(&through_lsn),
            "database {database}: lsn {through_lsn} is in no journal and not in the archive"
        );
        let entries = archive.range(..=through_lsn).rev();
        let mut commits = entries.filter_map(|(_, parts)| parts.last()?.header.transaction());
        commits.next()
    }

    /// An opened database has the image of the model at that transaction, and no transaction of an
    /// older epoch comes after it.
    pub fn check_opened(&self, database: usize, (epoch, lsn): (Epoch, Lsn), image: &Image) {
        let facts = &self.facts[database];
        let commits = facts
            .origins
            .values()
            .filter_map(|lsn| facts.committed.get(lsn));
        let missed = commits.filter(|at| at.epoch < epoch && at.lsn > lsn).max();
        assert_eq!(
            missed, None,
            "database {database}: opened in epoch {epoch} at lsn {lsn}, without a commit"
        );
        let model = self.facts[database].images.get(&lsn);
        assert!(
            lsn == Lsn::ZERO || model == Some(image),
            "database {database}: opened at lsn {lsn} with another image than the model's"
        );
    }

    /// Epochs and commit_lsn never go back on a node.
    pub fn note_ladder(&mut self, who: (Machine, u64, usize), epoch: Epoch, commit_lsn: Lsn) {
        let before = self.ladders.insert(who, (epoch, commit_lsn));
        assert!(
            before.is_none_or(|(earlier, lsn)| earlier <= epoch && lsn <= commit_lsn),
            "{who:?} went back from {before:?} to epoch {epoch}, commit_lsn {commit_lsn}"
        );
    }

    /// A rebuilt state machine begins from what is on disk.
    pub fn forget_ladder(&mut self, who: (Machine, u64, usize)) {
        self.ladders.remove(&who);
    }

    /// How many transactions are committed.
    pub fn commit_count(&self, database: usize) -> usize {
        self.facts[database].origins.len()
    }

    /// The epoch of the last committed entry.
    pub fn newest_decided(&self, database: usize) -> Epoch {
        let newest = self.facts[database].committed.values().next_back();
        newest.map_or(Epoch::ZERO, |position| position.epoch)
    }

    /// The last committed entry.
    pub fn commit_lsn(&self, database: usize) -> Lsn {
        let committed = self.facts[database].committed.keys();
        committed.copied().next_back().unwrap_or(Lsn::ZERO)
    }

    /// No acked commit is lost while any three of five disks survive: the log that recovery would
    /// choose from them has all that is committed, or the archive has.
    fn check_nothing_lost(&self, database: usize, disks: &[Option<&DatabaseState>]) {
        let facts = &self.facts[database];
        for set in (0u32..1 << REPLICA_COUNT).filter(|set| set.count_ones() == 3) {
            let survivors = (0..REPLICA_COUNT).filter(|index| set & 1 << index != 0);
            let donor = survivors
                .filter_map(|index| disks[index])
                .max_by_key(|state| state.last);
            facts.check_has_all(donor, &format!("database {database}, disks {set:05b}"));
        }
    }

    /// The same where the five change: whichever disks survive, if recovery takes them for a
    /// quorum, the log that it would choose from them has all that is committed, or the archive
    /// has.
    fn check_recovery(
        &self,
        database: usize,
        disks: &[Option<&DatabaseState>],
        configured: &Membership,
    ) {
        let facts = &self.facts[database];
        let members_of = |disk: &Option<&DatabaseState>| {
            disk.and_then(|state| state.membership.clone())
                .unwrap_or_else(|| configured.clone())
        };
        let told: Vec<Membership> = disks.iter().map(members_of).collect();
        let votes = |index: usize, member: &Member| {
            let replica = disks[index].and_then(|state| state.replica);
            node_index(&member.node) == index && replica.is_some() && member.replica == replica
        };
        let mut donors = BTreeMap::new();
        for chosen in 1..1u32 << disks.len() {
            let heard = || (0..disks.len()).filter(move |index| chosen >> index & 1 == 1);
            let newest = heard().max_by_key(|index| told[*index].epoch);
            let Some(members) = newest.map(|index| &told[index]) else {
                continue;
            };
            let is_heard = |member: &Member| heard().any(|index| votes(index, member));
            if !holds_quorum(members, is_heard) {
                continue;
            }
            let donor = heard()
                .filter(|index| members.all_members().any(|member| votes(*index, member)))
                .max_by_key(|index| disks[*index].map(|state| state.last));
            if let Some(donor) = donor {
                donors.entry(donor).or_insert(chosen);
            }
        }
        for (donor, chosen) in donors {
            facts.check_has_all(
                disks[donor],
                &format!("database {database}, disks {chosen:b}"),
            );
        }
    }

    /// Applies what is held from a place on, and compares with the model at every transaction.
    fn check_replay<'a>(
        &self,
        database: usize,
        who: &str,
        first_lsn: Lsn,
        parts: impl Iterator<Item = &'a EntryPart>,
    ) -> u64 {
        let facts = &self.facts[database];
        let before = first_lsn.previous().unwrap_or(Lsn::ZERO);
        let Some(mut image) = facts.image_at(before) else {
            return 0;
        };
        let mut compared = 0;
        for part in parts {
            let position = part.header.position();
            if facts.committed.get(&position.lsn) != Some(&position) {
                break; // an uncommitted tail
            }
            image.apply([part]);
            if part.header.is_last() {
                assert_eq!(
                    facts.images.get(&position.lsn),
                    Some(&image),
                    "{who}, database {database}: another image than the model's at {position}"
                );
                compared += 1;
            }
        }
        compared
    }
}

impl Facts {
    fn image_at(&self, lsn: Lsn) -> Option<Image> {
        if lsn == Lsn::ZERO {
            return Some(Image::default());
        }
        self.images.get(&lsn).cloned()
    }

    /// A transaction is made on top of the one before it: its checksum is the model's.
    fn extend_model(&mut self, database: usize) {
        loop {
            let last = self.images.keys().next_back().copied().unwrap_or(Lsn::ZERO);
            let next = last.next();
            let Some(position) = self.committed.get(&next).copied() else {
                return;
            };
            let (Some(mut image), Some(created)) =
                (self.image_at(last), self.created.get(&position))
            else {
                return;
            };
            image.apply(&created.parts);
            if let Some(commit) = created.commit {
                assert_eq!(
                    image.checksum(),
                    commit.checksum,
                    "database {database}: {position} was made on top of another image"
                );
            }
            self.images.insert(next, image);
        }
    }

    fn check_has_all(&self, donor: Option<&DatabaseState>, who: &str) {
        let archive_lsn = self.archive.keys().next_back().copied();
        let archive_lsn = archive_lsn.unwrap_or(Lsn::ZERO);
        let first_lsn = donor.map_or(Lsn::new(1), |state| state.first_lsn);
        assert!(
            first_lsn <= archive_lsn.next(),
            "{who}: the log begins at lsn {first_lsn}, the archive ends at {archive_lsn}"
        );
        for (lsn, position) in self.committed.range(archive_lsn.next()..) {
            let held = donor
                .filter(|state| *lsn <= state.last.lsn)
                .and_then(|state| {
                    let runs = state.history.iter().rev();
                    let run = runs.into_iter().find(|run| run.first_lsn <= *lsn)?;
                    Some(LogPosition::new(run.epoch, *lsn))
                });
            assert_eq!(
                held,
                Some(*position),
                "{who}: the committed entry at lsn {lsn} is lost; the log ends at {:?}",
                donor.map(|state| state.last)
            );
        }
    }
}

impl World {
    /// A promise is on disk before it is on the wire, and so is every entry that is acked; and what
    /// was once promised is never taken back.
    pub(super) fn check_told(&mut self, node: usize, database: usize, message: &ReplicaMessage) {
        let sampled = self.rng.below(6) == 0;
        if matches!(
            self.settings.mutation,
            Mutation::AckBeforeSync | Mutation::LyingDisks
        ) {
            return; // These must be seen by the commits that they lose.
        }
        let (epoch, claimant, lsn) = match message {
            ReplicaMessage::Promised(promise) => {
                (promise.epoch, Some(promise.claimant), promise.last.lsn)
            }
            ReplicaMessage::Ack {
                epoch, flush_lsn, ..
            } if sampled => (*epoch, None, *flush_lsn),
            _ => return,
        };
        let told = &mut self.nodes[node].told_epochs[database];
        assert!(
            epoch >= *told,
            "replica {node}: speaks for epoch {epoch} after it promised {told}"
        );
        *told = epoch;
        if let Some(claimant) = claimant {
            self.ever_promised[database] = true;
            let told = (database, epoch, claimant);
            self.nodes[node].told_promises.push(told);
        }
        let survivors = self.nodes[node].survivors();
        let on_disk = survivors.get(&database);
        let promised = on_disk.map_or(Epoch::ZERO, |state| state.promised);
        assert!(
            promised >= epoch,
            "replica {node}: epoch {epoch} is told, on disk is the promise of {promised}"
        );
        if let (Some(claimant), Some(state)) = (claimant, on_disk)
            && promised == epoch
        {
            assert_eq!(
                state.claimant,
                Some(claimant),
                "replica {node}: epoch {epoch} is promised to another on disk"
            );
        }
        let last_lsn = on_disk.map_or(Lsn::ZERO, |state| state.last.lsn);
        let archive_lsn = self.checker.facts[database].archive.keys().next_back();
        assert!(
            last_lsn >= lsn || archive_lsn.is_some_and(|archive_lsn| lsn <= *archive_lsn),
            "replica {node}: lsn {lsn} is told, the disk ends at lsn {last_lsn}"
        );
    }

    /// All checks that look at everything.
    pub(super) fn check_all(&mut self) {
        let survivors: Vec<BTreeMap<usize, DatabaseState>> = self
            .nodes
            .iter()
            .map(super::node::Node::survivors)
            .collect();
        for database in 0..DATABASE_COUNT {
            let disks: Vec<Option<&DatabaseState>> = survivors
                .iter()
                .map(|states| states.get(&database))
                .collect();
            match self.settings.has_changes() {
                true => self
                    .checker
                    .check_recovery(database, &disks, &self.configured()),
                false => self.checker.check_nothing_lost(database, &disks),
            }
        }
        for node in 0..self.nodes.len() {
            self.check_replica(node);
        }
    }

    /// What a replica takes for committed is committed; archive_lsn <= commit_lsn <= flush_lsn.
    fn check_replica(&mut self, node: usize) {
        let life = self.nodes[node].life;
        let Some(running) = &self.nodes[node].up else {
            return;
        };
        for (database, log) in &running.logs {
            let machine = log.machine();
            assert!(
                machine.archive_lsn() <= machine.commit_lsn()
                    && machine.commit_lsn() <= machine.flush_lsn()
                    && machine.flush_lsn() <= machine.last().lsn,
                "replica {node} database {database}: the ladder is broken: {machine:?}"
            );
            let facts = &self.checker.facts[*database];
            let commit_lsn = machine.commit_lsn();
            let held = machine.history().position_at(commit_lsn);
            if commit_lsn > Lsn::ZERO
                && let Some(held) = held
            {
                assert_eq!(
                    facts.committed.get(&commit_lsn),
                    Some(&held),
                    "replica {node} database {database}: takes {held} for committed"
                );
            }
            let who = (Machine::Node(node), life, *database);
            let (promised, commit_lsn) = (machine.promised(), machine.commit_lsn());
            if machine.trouble().is_none() {
                self.checker.note_ladder(who, promised, commit_lsn);
            }
        }
    }

    /// The image at every bookmark equals the model's: from the archive alone, and from each
    /// replica's journal.
    pub(super) fn check_images(&mut self) {
        for database in 0..DATABASE_COUNT {
            let facts = &self.checker.facts[database];
            let archived = facts.archive.values().flatten();
            let mut compared =
                self.checker
                    .check_replay(database, "archive", Lsn::new(1), archived);
            for node in 0..self.nodes.len() {
                let Some((first_lsn, parts)) = self.node_entries(node, database) else {
                    continue;
                };
                let parts: Vec<EntryPart> = match parts.collect() {
                    Ok(parts) => parts,
                    Err(error) => panic!("replica {node}: its journal cannot be read: {error}"),
                };
                let who = format!("replica {node}");
                compared += self
                    .checker
                    .check_replay(database, &who, first_lsn, parts.iter());
            }
            self.tally.replayed_commits += compared;
        }
    }
}
