//! Histories by hand: one that is right, and what must be found in others.

use super::*;

/// Two clients, four transactions and a reader, one after another.
fn right() -> (History, State) {
    let lines = [
        (
            0,
            r#"{"try":1,"begin":10,"version":1,"lists":{"0":[]},"append":[0,7]}"#,
        ),
        (0, r#"{"told":1,"end":20,"outcome":"ok","code":0}"#),
        (
            1,
            r#"{"try":1,"begin":30,"version":2,"balances":{"0":100,"1":100},"transfer":[0,1,5]}"#,
        ),
        (1, r#"{"told":1,"end":40,"outcome":"unknown","code":1034}"#),
        (
            0,
            r#"{"try":2,"begin":50,"version":3,"lists":{"0":[7]},"append":[0,8]}"#,
        ),
        (0, r#"{"told":2,"end":60,"outcome":"no","code":778}"#),
        (
            1,
            r#"{"try":2,"begin":70,"version":3,"lists":{"0":[7]},"append":[0,9]}"#,
        ),
        (1, r#"{"told":2,"end":80,"outcome":"ok","code":0}"#),
        (
            0,
            r#"{"try":3,"begin":90,"version":3,"balances":{"1":105},"lists":{"0":[7,9]}}"#,
        ),
        (0, r#"{"told":3,"end":95,"outcome":"ok","code":0}"#),
        (0, r#"{"try":4,"begin":96}"#),
        (0, r#"{"told":4,"end":97,"outcome":"no","code":8}"#),
    ];
    let mut history = History::default();
    for (client, line) in lines {
        history.note(client, line);
    }
    let mut end = State::first();
    for origin in [(0, 1), (1, 1), (1, 2)] {
        end.apply(origin, history.attempts[&origin].effect.unwrap());
    }
    (history, end)
}

fn found(history: &History, end: &State) -> String {
    let checks = [check_outcomes, check_order, check_times, check_cycles];
    let found = checks.iter().find_map(|check| check(history, end).err());
    found.unwrap_or_default()
}

#[test]
fn a_history_of_one_order_is_right() {
    // Broken: the checks would cry at histories that are legal.
    let (history, end) = right();
    assert_eq!(found(&history, &end), "");
    assert_eq!(
        (history.next(0), history.next(1), history.next(2)),
        (5, 3, 1)
    );
    assert_eq!((history.committed(0), history.committed(1)), (1, 1));
}

#[test]
fn lost_and_risen_writes_are_found() {
    // Broken: a database that forgets commits, or makes refused ones, would pass.
    let (history, mut end) = right();
    end.entries.pop();
    end.lists.get_mut(&0).unwrap().pop();
    assert!(found(&history, &end).contains("is lost"));
    let (mut history, end) = right();
    history.attempts.get_mut(&(1, 1)).unwrap().told = Told::Refused(778);
    assert!(found(&history, &end).contains("was refused (778) and is version 2"));
    let (history, mut end) = right();
    end.entries.push((1, 9));
    assert!(found(&history, &end).contains("nobody did it"));
    let (history, mut end) = right();
    end.entries.push((0, 1));
    assert!(found(&history, &end).contains("there twice"));
    let (history, mut end) = right();
    end.entries.remove(1);
    assert!(found(&history, &end).contains("is version 2, and was Some(3)"));
}

#[test]
fn reads_that_do_not_fit_the_order_are_found() {
    // Broken: a transaction that overwrote what it had not seen, or a reader of what never was,
    // would pass.
    let (mut history, end) = right();
    history
        .attempts
        .get_mut(&(1, 2))
        .unwrap()
        .lists
        .insert(0, Vec::new());
    assert!(found(&history, &end).contains("version 3: read [] in list 0"));
    let (mut history, end) = right();
    history
        .attempts
        .get_mut(&(0, 3))
        .unwrap()
        .balances
        .insert(1, 100);
    assert!(found(&history, &end).contains("reader (0, 3) of version 3"));
    let (mut history, end) = right();
    history.attempts.get_mut(&(0, 3)).unwrap().version = Some(4);
    assert!(found(&history, &end).contains("which never was"));
    let (history, mut end) = right();
    end.balances.insert(0, 94);
    assert!(found(&history, &end).contains("799 in all"));
    let (history, mut end) = right();
    end.balances.insert(0, 100);
    end.balances.insert(1, 100);
    assert!(found(&history, &end).contains("not what its transactions have made"));
}

#[test]
fn an_order_against_the_clock_is_found() {
    // Broken: a host that goes on with what it knew before the other took over would pass.
    let (mut history, end) = right();
    let late = history.attempts.get_mut(&(0, 1)).unwrap();
    (late.begin, late.end) = (100, Some(110));
    assert!(found(&history, &end).contains("has a later version"));
    let (mut history, end) = right();
    let reader = history.attempts.get_mut(&(0, 3)).unwrap();
    reader.version = Some(0);
    reader.balances.insert(1, 100);
    reader.lists.clear();
    assert!(found(&history, &end).contains("client 0 saw 1, and 0 with 3"));
}

/// Transactions that say which lists they read and what they append, one in each client.
fn of_lists(transactions: &[(&str, [u64; 2])], end: &[(u64, &[u64])]) -> (History, State) {
    let mut history = History::default();
    for ((line, [begin, end]), client) in transactions.iter().zip(0..) {
        history.note(
            client,
            &format!("{{\"try\":1,\"begin\":{begin},\"version\":1,{line}}}"),
        );
        let told = format!("{{\"told\":1,\"end\":{end},\"outcome\":\"ok\",\"code\":0}}");
        history.note(client, &told);
    }
    let mut state = State::first();
    let list = |(name, items): &(u64, &[u64])| (*name, items.to_vec());
    state.lists = end.iter().map(list).collect();
    (history, state)
}

fn found_in_lists(transactions: &[(&str, [u64; 2])], end: &[(u64, &[u64])]) -> String {
    let (history, state) = of_lists(transactions, end);
    check_cycles(&history, &state).err().unwrap_or_default()
}

#[test]
fn circles_of_reads_and_appends_are_found() {
    // Broken: the check of lists would agree with any history, or with none.
    const ALWAYS: [u64; 2] = [0, 100];
    let circle = "comes before the next";
    // One after another, as their times say.
    let first = (r#""lists":{"0":[]},"append":[0,7]"#, [0, 10]);
    let second = (r#""lists":{"0":[7]},"append":[0,8]"#, [20, 30]);
    assert_eq!(found_in_lists(&[first, second], &[(0, &[7, 8])]), "");
    // Both began from nothing: one of them overwrote the other's list, and then it is there.
    let blind = (r#""lists":{"0":[]},"append":[0,8]"#, ALWAYS);
    assert!(found_in_lists(&[first, blind], &[(0, &[7, 8])]).contains(circle));
    // Each appends to what the other read before: nobody was first.
    let one = (r#""lists":{"0":[],"1":[]},"append":[0,7]"#, ALWAYS);
    let other = (r#""lists":{"0":[],"1":[]},"append":[1,8]"#, ALWAYS);
    assert!(found_in_lists(&[one, other], &[(0, &[7]), (1, &[8])]).contains(circle));
    // Two readers who saw the two appends in two orders.
    let left = (r#""lists":{},"append":[0,7]"#, ALWAYS);
    let right = (r#""lists":{},"append":[1,8]"#, ALWAYS);
    let sees_left = (r#""lists":{"0":[7],"1":[]}"#, ALWAYS);
    let sees_right = (r#""lists":{"0":[],"1":[8]}"#, ALWAYS);
    let lists: [(u64, &[u64]); 2] = [(0, &[7]), (1, &[8])];
    assert_eq!(found_in_lists(&[left, right, sees_left], &lists), "");
    assert!(found_in_lists(&[left, right, sees_left, sees_right], &lists).contains(circle));
    // The later one is in the list before the earlier one.
    let blind_late = (r#""lists":{},"append":[0,8]"#, [20, 30]);
    let early = (r#""lists":{"0":[8]},"append":[0,7]"#, [0, 10]);
    assert!(found_in_lists(&[early, blind_late], &[(0, &[8, 7])]).contains(circle));
    // What nobody could read.
    let reader = (r#""lists":{"0":[8]}"#, ALWAYS);
    assert!(found_in_lists(&[first, reader], &[(0, &[7])]).contains("read [8] in list 0"));
    assert!(found_in_lists(&[], &[(0, &[7])]).contains("nobody appended 7"));
    assert!(found_in_lists(&[first], &[(0, &[7, 7])]).contains("twice"));
    let (mut history, state) = of_lists(&[first], &[(0, &[7])]);
    history.attempts.get_mut(&(0, 1)).unwrap().told = Told::Refused(778);
    assert!(
        check_cycles(&history, &state)
            .unwrap_err()
            .contains("was refused")
    );
}
