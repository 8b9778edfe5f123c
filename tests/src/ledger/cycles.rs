//! The list-append check: what follows from the lists alone, without the versions that the
//! transactions say. Who appended after whom, who read whose item and who did not yet see whose,
//! and which writer began after which was told to be committed: these must not go in a circle.

use super::{Attempt, Effect, History, Origin, State, Told};
use std::collections::BTreeMap;

/// A transaction, or the moment at which one was told to be committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Node {
    Transaction(Origin),
    Moment(u64, Origin),
}

/// What has to come before what.
#[derive(Debug, Default)]
struct Graph {
    edges: BTreeMap<Node, Vec<Node>>,
}

impl Graph {
    fn add(&mut self, before: Node, after: Node) {
        // A transaction may build on itself.
        if before != after {
            self.edges.entry(before).or_default().push(after);
            self.edges.entry(after).or_default();
        }
    }

    /// A circle, if there is one.
    fn circle(&self) -> Option<Vec<Node>> {
        let mut ahead: BTreeMap<Node, usize> = self.edges.keys().map(|node| (*node, 0)).collect();
        for after in self.edges.values().flatten() {
            *ahead.entry(*after).or_default() += 1;
        }
        let free = ahead.iter().filter(|(_, count)| **count == 0);
        let mut free: Vec<Node> = free.map(|(node, _)| *node).collect();
        while let Some(node) = free.pop() {
            ahead.remove(&node);
            for after in &self.edges[&node] {
                let count = ahead.get_mut(after)?;
                *count -= 1;
                if *count == 0 {
                    free.push(*after);
                }
            }
        }
        // What is left has something before it that is left as well: going back ends in a circle.
        let mut path = vec![*ahead.keys().next()?];
        loop {
            let last = path[path.len() - 1];
            let before = ahead.keys().find(|node| self.edges[node].contains(&last))?;
            if let Some(place) = path.iter().position(|node| node == before) {
                let mut circle = path.split_off(place);
                circle.reverse();
                return Some(circle);
            }
            path.push(*before);
        }
    }
}

/// The lists admit an order of all transactions.
///
/// # Errors
/// A circle, or a read of what nobody appended, of what was refused, or of another order of items.
pub fn check_cycles(history: &History, end: &State) -> Result<(), String> {
    let appenders = appenders(history, end)?;
    let mut graph = Graph::default();
    for items in end.lists.values() {
        for pair in items.windows(2) {
            graph.add(
                Node::Transaction(appenders[&pair[0]]),
                Node::Transaction(appenders[&pair[1]]),
            );
        }
    }
    for (origin, attempt) in &history.attempts {
        if counts(attempt, *origin, &appenders) {
            add_reads(&mut graph, (*origin, attempt), end, &appenders)?;
        }
    }
    add_times(&mut graph, history, &appenders);
    match graph.circle() {
        Some(circle) => Err(format!("each of these comes before the next: {circle:?}")),
        None => Ok(()),
    }
}

/// Who appended each item that is in a list.
fn appenders(history: &History, end: &State) -> Result<BTreeMap<u64, Origin>, String> {
    let mut of_items = BTreeMap::new();
    for (origin, attempt) in &history.attempts {
        if let Some(Effect::Append(_, item)) = attempt.effect {
            of_items.insert(item, (*origin, attempt));
        }
    }
    let mut appenders = BTreeMap::new();
    for item in end.lists.values().flatten() {
        let found = of_items.get(item);
        let (origin, attempt) = found.ok_or_else(|| format!("nobody appended {item}"))?;
        if let Told::Refused(code) = attempt.told {
            return Err(format!(
                "{item} of {origin:?} was refused ({code}) and is in a list"
            ));
        }
        if appenders.insert(*item, *origin).is_some() {
            return Err(format!("{item} is in the lists twice"));
        }
    }
    Ok(appenders)
}

/// Whether a transaction happened.
fn counts(attempt: &Attempt, origin: Origin, appenders: &BTreeMap<u64, Origin>) -> bool {
    let is_seen = match attempt.effect {
        Some(Effect::Append(_, item)) => appenders.get(&item) == Some(&origin),
        _ => false,
    };
    attempt.version.is_some() && (is_seen || attempt.told == Told::Committed)
}

fn add_reads(
    graph: &mut Graph,
    (origin, attempt): (Origin, &Attempt),
    end: &State,
    appenders: &BTreeMap<u64, Origin>,
) -> Result<(), String> {
    for (name, read) in &attempt.lists {
        let all = end.lists.get(name).map_or(&[][..], Vec::as_slice);
        if !all.starts_with(read) {
            return Err(format!(
                "{origin:?} read {read:?} in list {name}, which is {all:?}"
            ));
        }
        let reader = Node::Transaction(origin);
        if let Some(last) = read.last() {
            graph.add(Node::Transaction(appenders[last]), reader);
        }
        if let Some(next) = all.get(read.len()) {
            graph.add(reader, Node::Transaction(appenders[next]));
        }
    }
    Ok(())
}

/// A writer that began after another one was told comes after it. (One that only reads may see an
/// earlier state, on a host that is no longer the primary.)
fn add_times(graph: &mut Graph, history: &History, appenders: &BTreeMap<u64, Origin>) {
    let writers = history.attempts.iter().filter(|(origin, attempt)| {
        attempt.effect.is_some() && counts(attempt, **origin, appenders)
    });
    let told = writers
        .clone()
        .filter(|(_, attempt)| attempt.told == Told::Committed);
    let moments: BTreeMap<(u64, Origin), Node> = told
        .filter_map(|(origin, attempt)| {
            let key = (attempt.end?, *origin);
            Some((key, Node::Moment(key.0, key.1)))
        })
        .collect();
    for ((_, origin), moment) in &moments {
        graph.add(Node::Transaction(*origin), *moment);
    }
    for (earlier, later) in moments.values().zip(moments.values().skip(1)) {
        graph.add(*earlier, *later);
    }
    for (origin, attempt) in writers {
        let before = moments.range(..(attempt.begin, (0, 0))).next_back();
        if let Some((_, moment)) = before {
            graph.add(*moment, Node::Transaction(*origin));
        }
    }
}
