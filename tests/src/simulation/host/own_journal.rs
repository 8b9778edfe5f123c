//! A host's own journal: what is handed to it, and what becomes known of it later.

use super::*;

impl World {
    pub(super) fn cut_own_log(&mut self, host: usize, database: usize, after: LogPosition) {
        if let Some(serving) = self.hosts[host].serving(database) {
            serving.written_lsn = serving.written_lsn.min(after.lsn);
        }
        let database_id = database_id(database);
        let record = Record::Truncate {
            database: database_id,
            after,
        };
        self.write_own(host, database, vec![record], LogPosition::ZERO, false);
    }

    pub(super) fn restart_own_log(&mut self, host: usize, database: usize, at: LogPosition) {
        self.tally.own_restarts += 1;
        if let Some(serving) = self.hosts[host].serving(database) {
            serving.written_lsn = at.lsn;
            serving.machine.handle_retained(at.lsn.next());
        }
        let record = Record::Restart {
            database: database_id(database),
            at,
        };
        self.write_own(host, database, vec![record], LogPosition::ZERO, false);
    }

    /// Hands records to the own journal; they are heard of when it wrote them.
    pub(in crate::simulation) fn write_own(
        &mut self,
        host: usize,
        database: usize,
        records: Vec<Record>,
        position: LogPosition,
        complete: bool,
    ) {
        if let Some(serving) = self.hosts[host].serving(database) {
            serving.own_writes += 1;
        }
        self.hand_over(
            host,
            database,
            records,
            OwnWritten::Records { position, complete },
        );
    }

    /// Hands a fetched part to the own journal.
    pub(in crate::simulation) fn write_fetched(
        &mut self,
        host: usize,
        database: usize,
        fetch: u64,
        part: EntryPart,
    ) {
        let records = vec![Record::Part(part)];
        self.hand_over(host, database, records, OwnWritten::Fetched(fetch));
    }

    pub(super) fn hand_over(
        &mut self,
        host: usize,
        database: usize,
        records: Vec<Record>,
        what: OwnWritten,
    ) {
        let Some(running) = &self.hosts[host].up else {
            return;
        };
        let notices = running.notices.clone();
        let done = move |result| {
            let notice = OwnNotice {
                database,
                what,
                result,
            };
            notices
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(notice);
        };
        running.journal.append(records, Box::new(done));
        self.wake_journal(Machine::Host(host));
    }

    pub(in crate::simulation) fn host_write(&mut self, host: usize, life: u64) {
        if self.hosts[host].life != life {
            return;
        }
        let Some(running) = &mut self.hosts[host].up else {
            return;
        };
        running.write_scheduled = false;
        running.driver.write_waiting();
        if self.hosts[host].disk.is_off() {
            return self.crash_host(host, true);
        }
        let machine = Machine::Host(host);
        let after = 20 + self.rng.below(1_000);
        self.schedule.after(after, Event::Hear { machine, life });
    }

    pub(in crate::simulation) fn host_rest(&mut self, host: usize, life: u64) {
        if self.hosts[host].life != life {
            return;
        }
        let Some(running) = &mut self.hosts[host].up else {
            return;
        };
        running.driver.rest();
        if self.hosts[host].disk.is_off() {
            return self.crash_host(host, true);
        }
        self.schedule_rest(Machine::Host(host), life);
    }

    pub(in crate::simulation) fn host_hear(&mut self, host: usize, life: u64) {
        if self.hosts[host].life != life {
            return;
        }
        let Some(running) = &self.hosts[host].up else {
            return;
        };
        let notices = std::mem::take(
            &mut *running
                .notices
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for notice in notices {
            match notice.what {
                OwnWritten::Records { position, complete } => {
                    let written = (position, complete);
                    self.own_written(host, notice.database, written, notice.result.is_ok());
                }
                OwnWritten::Fetched(fetch) => {
                    self.fetched_written(host, notice.database, fetch, notice.result.is_ok());
                }
                OwnWritten::Progress(drop_through) => {
                    if let (Some(through), Ok(()), Some(running)) =
                        (drop_through, notice.result, &self.hosts[host].up)
                    {
                        running
                            .journal
                            .drop_through(database_id(notice.database), through);
                        self.wake_journal(Machine::Host(host));
                    }
                }
            }
            self.drive(host, notice.database);
        }
    }

    pub(super) fn own_written(
        &mut self,
        host: usize,
        database: usize,
        (position, complete): (LogPosition, bool),
        is_ok: bool,
    ) {
        let local = self.local(host);
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        serving.own_writes = serving.own_writes.saturating_sub(1);
        if !is_ok {
            serving.own_trouble = true;
            serving.claim_at = Some(local + 200_000);
        } else if complete && position.epoch == serving.machine.epoch() {
            serving.written_lsn = serving.written_lsn.max(position.lsn);
        }
        if serving.own_writes == 0
            && let Some(position) = serving.epoch_start.take()
        {
            self.write_epoch_start(host, database, position);
        }
        if complete {
            self.pump_feeds(host, database);
        }
    }

    pub(super) fn write_epoch_start(
        &mut self,
        host: usize,
        database: usize,
        position: LogPosition,
    ) {
        let time = self.entry_time(host, database);
        let Some(running) = &mut self.hosts[host].up else {
            return;
        };
        let held = running.journal.state(database_id(database));
        let Some(serving) = running.servings.get_mut(&database) else {
            return;
        };
        if serving.own_trouble || serving.machine.epoch() != position.epoch {
            return;
        }
        let end = serving.machine.last();
        let last_transaction = match serving.donor_end.last_transaction(held.as_ref(), end) {
            LastTransaction::Known(last) => last,
            // The archive answers at once here.
            LastTransaction::Archived { through_lsn } => {
                self.checker.archived_transaction(database, through_lsn)
            }
        };
        serving.last_transaction = last_transaction;
        let header = PartHeader {
            database: database_id(database),
            epoch: position.epoch,
            lsn: position.lsn,
            part: 0,
            kind: PartKind::EpochStart {
                time,
                last_transaction,
            },
        };
        let named = Record::Promise {
            database: database_id(database),
            name: format!("database-{database}"),
            epoch: position.epoch,
            claimant: serving.claimant,
            replica: None,
        };
        let payload = Bytes::new();
        self.write_own(host, database, vec![named], LogPosition::ZERO, false);
        self.append_own(host, database, EntryPart { header, payload });
    }

    /// Appends the last part of an entry: to the level replicas at once, and to the own journal.
    pub(in crate::simulation) fn append_own(
        &mut self,
        host: usize,
        database: usize,
        entry: EntryPart,
    ) {
        let position = entry.header.position();
        let Some(serving) = self.hosts[host].serving(database) else {
            return;
        };
        let message = PrimaryMessage::Append {
            generation: serving.machine.membership().generation,
            epoch: serving.machine.epoch(),
            previous: serving.machine.last(),
            commit_lsn: serving.machine.commit_lsn(),
            archive_lsn: serving.machine.archive_lsn(),
            part: entry.header,
        };
        self.checker.create(database, &entry);
        serving.machine.handle_appended(position);
        if entry.header.part == 0 {
            self.push_level(host, database, position, &message, &entry.payload);
        }
        self.write_own(host, database, vec![Record::Part(entry)], position, true);
        self.drive(host, database);
    }
}
