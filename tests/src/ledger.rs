//! Histories of transactions that say what they read and wrote, and when, and whether they are
//! those of one database in which one transaction follows another: `programs/contender.py` makes
//! them. Nothing in here runs anything.

mod cycles;

pub use cycles::check_cycles;

use serde_json::Value;
use std::collections::BTreeMap;

/// Accounts, and what is on each at first.
pub const ACCOUNTS: (u64, i64) = (8, 100);

/// What the tables are, before the first transaction.
pub fn schema() -> Vec<String> {
    let (count, money) = ACCOUNTS;
    let mut statements = vec![
        "CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER)".to_owned(),
        "CREATE TABLE lists (name INTEGER PRIMARY KEY, items TEXT)".to_owned(),
        "CREATE TABLE entries (version INTEGER PRIMARY KEY, client INTEGER, n INTEGER)".to_owned(),
    ];
    for id in 0..count {
        statements.push(format!("INSERT INTO accounts VALUES ({id}, {money})"));
    }
    statements
}

/// Who made a transaction: a client and its number there.
pub type Origin = (u64, u64);

/// What became of a transaction, as its client was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// COMMIT returned OK.
    Committed,
    /// Refused, for certain.
    Refused(i64),
    /// COMMIT said: unknown; or the client was killed before it heard.
    Unknown,
}

/// What a transaction does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// From an account, to another, how much.
    Transfer(u64, u64, i64),
    /// To a list, an item.
    Append(u64, u64),
}

/// One transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// When it began, in microseconds of a clock that all clients share.
    pub begin: u64,
    /// When its client heard of it.
    pub end: Option<u64>,
    /// What it heard.
    pub told: Told,
    /// The version that it made, or, of one that only reads, the one it saw. None when it failed
    /// before.
    pub version: Option<u64>,
    /// What it read before it wrote.
    pub balances: BTreeMap<u64, i64>,
    /// The same of lists.
    pub lists: BTreeMap<u64, Vec<u64>>,
    /// What it wrote.
    pub effect: Option<Effect>,
}

/// All that clients said.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Each transaction.
    pub attempts: BTreeMap<Origin, Attempt>,
}

fn numbers<T, R>(object: &Value, read: impl Fn(&Value) -> R) -> BTreeMap<u64, T>
where
    R: Into<T>,
{
    let members = object.as_object().into_iter().flatten();
    let member = |(key, value): (&String, &Value)| {
        let key = key.parse().expect("a number as a key");
        (key, read(value).into())
    };
    members.map(member).collect()
}

fn items(list: &Value) -> Vec<u64> {
    let items = list.as_array().expect("a list");
    items.iter().map(number).collect()
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

fn signed(value: &Value) -> i64 {
    value.as_i64().expect("a number")
}

impl History {
    /// Notes a line of a client.
    ///
    /// # Panics
    /// When it is none.
    pub fn note(&mut self, client: u64, line: &str) {
        let said: Value = serde_json::from_str(line).expect("a line of JSON");
        if let Some(n) = said["try"].as_u64() {
            let (transfer, append) = (&said["transfer"], &said["append"]);
            let effect = if transfer.is_array() {
                let [from, to] = [number(&transfer[0]), number(&transfer[1])];
                Some(Effect::Transfer(from, to, signed(&transfer[2])))
            } else if append.is_array() {
                Some(Effect::Append(number(&append[0]), number(&append[1])))
            } else {
                None
            };
            let attempt = Attempt {
                begin: number(&said["begin"]),
                end: None,
                told: Told::Unknown,
                version: said["version"].as_u64(),
                balances: numbers(&said["balances"], signed),
                lists: numbers(&said["lists"], items),
                effect,
            };
            self.attempts.insert((client, n), attempt);
            return;
        }
        let origin = (client, number(&said["told"]));
        let attempt = self.attempts.get_mut(&origin).expect("it was tried");
        attempt.end = Some(number(&said["end"]));
        attempt.told = match said["outcome"].as_str() {
            Some("ok") => Told::Committed,
            Some("no") => Told::Refused(signed(&said["code"])),
            _ => Told::Unknown,
        };
    }

    /// The number after the last one of a client.
    pub fn next(&self, client: u64) -> u64 {
        let own = self.attempts.range((client, 0)..(client + 1, 0));
        own.last().map_or(1, |((_, n), _)| n + 1)
    }

    /// How many writing transactions of a client were told this.
    pub fn count(&self, client: u64, wanted: impl Fn(&Told) -> bool) -> usize {
        let own = self.attempts.range((client, 0)..(client + 1, 0));
        let writes = own.filter(|(_, attempt)| attempt.effect.is_some());
        writes.filter(|(_, attempt)| wanted(&attempt.told)).count()
    }

    /// SQLite's result codes of all that was refused, and how many each.
    pub fn refusals(&self) -> BTreeMap<i64, usize> {
        let mut refusals = BTreeMap::new();
        for attempt in self.attempts.values() {
            if let Told::Refused(code) = attempt.told {
                *refusals.entry(code).or_default() += 1;
            }
        }
        refusals
    }

    /// How many were told that they are committed.
    pub fn committed(&self, client: u64) -> usize {
        self.count(client, |told| *told == Told::Committed)
    }
}

/// What a database holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// By account.
    pub balances: BTreeMap<u64, i64>,
    /// By name.
    pub lists: BTreeMap<u64, Vec<u64>>,
    /// Who made each version, from the first on.
    pub entries: Vec<Origin>,
}

impl State {
    /// Before the first transaction.
    pub fn first() -> Self {
        let (count, money) = ACCOUNTS;
        Self {
            balances: (0..count).map(|account| (account, money)).collect(),
            lists: BTreeMap::new(),
            entries: Vec::new(),
        }
    }

    /// What plain SQLite reads from a file.
    ///
    /// # Panics
    /// When it cannot, or the versions have a gap.
    pub fn of(database: &std::path::Path) -> Self {
        let rows = |sql: &str| crate::app::plain_query(database, sql);
        let pair = |row: &str| {
            let (left, right) = row.split_once('|').expect("two columns");
            (left.parse().expect("a number"), right.to_owned())
        };
        let balances = rows("SELECT id, balance FROM accounts");
        let lists = rows("SELECT name, items FROM lists");
        let entries = rows("SELECT client, n FROM entries ORDER BY version");
        let count = entries.len().to_string();
        let versions = rows(
            "SELECT count(*) FROM entries WHERE version BETWEEN 1 AND \
                             (SELECT count(*) FROM entries)",
        );
        assert_eq!(versions, [count], "versions are missing");
        let parsed = |text: String| text.parse().expect("a number");
        let list = |text: String| {
            text.split(' ')
                .map(|item| parsed(item.to_owned()))
                .collect()
        };
        Self {
            balances: balances
                .iter()
                .map(|row| pair(row))
                .map(|(id, text)| (id, text.parse().expect("a number")))
                .collect(),
            lists: lists
                .iter()
                .map(|row| pair(row))
                .map(|(name, text)| (name, list(text)))
                .collect(),
            entries: entries
                .iter()
                .map(|row| pair(row))
                .map(|(client, n)| (client, parsed(n)))
                .collect(),
        }
    }

    /// What is not as the transaction read it.
    fn difference(&self, attempt: &Attempt) -> Option<String> {
        for (account, read) in &attempt.balances {
            let held = self.balances.get(account);
            if held != Some(read) {
                return Some(format!(
                    "read {read} on account {account}, which held {held:?}"
                ));
            }
        }
        for (name, read) in &attempt.lists {
            let held = self.lists.get(name).map_or(&[][..], Vec::as_slice);
            if held != read {
                return Some(format!("read {read:?} in list {name}, which held {held:?}"));
            }
        }
        None
    }

    fn apply(&mut self, origin: Origin, effect: Effect) {
        match effect {
            Effect::Transfer(from, to, amount) => {
                *self.balances.entry(from).or_default() -= amount;
                *self.balances.entry(to).or_default() += amount;
            }
            Effect::Append(name, item) => self.lists.entry(name).or_default().push(item),
        }
        self.entries.push(origin);
    }
}

/// Nothing that was told to be committed is missing, nothing that was refused is there, nothing is
/// there that nobody did, or at another version than it was done.
///
/// # Errors
/// What is wrong.
pub fn check_outcomes(history: &History, end: &State) -> Result<(), String> {
    let mut places = BTreeMap::new();
    for (origin, version) in end.entries.iter().zip(1_u64..) {
        if let Some(before) = places.insert(*origin, version) {
            return Err(format!(
                "{origin:?} is there twice: versions {before} and {version}"
            ));
        }
        let attempt = history.attempts.get(origin);
        let attempt = attempt.ok_or_else(|| format!("{origin:?} is there, and nobody did it"))?;
        if attempt.version != Some(version) {
            return Err(format!(
                "{origin:?} is version {version}, and was {:?}",
                attempt.version
            ));
        }
    }
    for (origin, attempt) in &history.attempts {
        if attempt.effect.is_none() {
            continue;
        }
        match (attempt.told, places.get(origin)) {
            (Told::Committed, None) => {
                return Err(format!("committed {origin:?} is lost: {attempt:?}"));
            }
            (Told::Refused(code), Some(version)) => {
                return Err(format!(
                    "{origin:?} was refused ({code}) and is version {version}"
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Each transaction read what those before it in the order of versions had written, also those that
/// only read, on whichever host; and at the end the database is what they all have made.
///
/// # Errors
/// What is wrong.
pub fn check_order(history: &History, end: &State) -> Result<(), String> {
    let mut readers: BTreeMap<u64, Vec<(&Origin, &Attempt)>> = BTreeMap::new();
    for (origin, attempt) in &history.attempts {
        if let (None, Some(version)) = (attempt.effect, attempt.version) {
            readers.entry(version).or_default().push((origin, attempt));
        }
    }
    let mut state = State::first();
    for version in 0..=end.entries.len() as u64 {
        if let Some(origin) = version.checked_sub(1).map(|at| end.entries[at as usize]) {
            let attempt = &history.attempts[&origin];
            if let Some(difference) = state.difference(attempt) {
                return Err(format!("{origin:?}, version {version}: {difference}"));
            }
            let effect = attempt
                .effect
                .ok_or_else(|| format!("{origin:?} wrote nothing"))?;
            state.apply(origin, effect);
        }
        for (origin, attempt) in readers.remove(&version).unwrap_or_default() {
            if let Some(difference) = state.difference(attempt) {
                return Err(format!(
                    "reader {origin:?} of version {version}: {difference}"
                ));
            }
        }
    }
    if let Some((version, readers)) = readers.first_key_value() {
        return Err(format!(
            "{:?} saw version {version}, which never was",
            readers[0].0
        ));
    }
    let money: i64 = end.balances.values().sum();
    if money != ACCOUNTS.0 as i64 * ACCOUNTS.1 {
        return Err(format!("{money} in all"));
    }
    if state != *end {
        return Err("the database is not what its transactions have made".to_owned());
    }
    Ok(())
}

/// A transaction that began after another one was told to be committed has a later version: the
/// order is one that people could have seen.
///
/// # Errors
/// What is wrong.
pub fn check_times(history: &History, end: &State) -> Result<(), String> {
    let mut latest: Option<(u64, Origin)> = None;
    for origin in &end.entries {
        let attempt = &history.attempts[origin];
        if let (Told::Committed, Some(told_at)) = (attempt.told, attempt.end)
            && let Some((begin, later)) = latest
            && told_at < begin
        {
            return Err(format!(
                "{origin:?} was committed before {later:?} began, and has a later version"
            ));
        }
        if latest.is_none_or(|(begin, _)| attempt.begin > begin) {
            latest = Some((attempt.begin, *origin));
        }
    }
    // Each client sees its own commits, and never goes back.
    let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
    for ((client, n), attempt) in &history.attempts {
        let (Told::Committed, Some(version)) = (attempt.told, attempt.version) else {
            continue;
        };
        let before = seen.insert(*client, version).unwrap_or(0);
        if version < before {
            return Err(format!(
                "client {client} saw {before}, and {version} with {n}"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
