//! Whether a statement of SQL is `VACUUM … INTO`.

/// The part of SQL's tokens that matters here.
#[derive(Debug, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    Quoted,
    Other,
}

/// Whether a statement writes a copy of a database into another file.
pub(crate) fn is_vacuum_into(sql: &str) -> bool {
    let (first, rest) = next_token(sql);
    if !is_word(&first, "VACUUM") {
        return false;
    }
    let (second, rest) = next_token(rest);
    match second {
        Token::Word(word) if word.eq_ignore_ascii_case("INTO") => true,
        // The schema that is copied.
        Token::Word(_) | Token::Quoted => is_word(&next_token(rest).0, "INTO"),
        Token::Other => false,
    }
}

fn is_word(token: &Token<'_>, word: &str) -> bool {
    matches!(token, Token::Word(found) if found.eq_ignore_ascii_case(word))
}

/// The first token, and what follows it. Empty statements before it are skipped, as by SQLite.
fn next_token(sql: &str) -> (Token<'_>, &str) {
    let sql = skip_blanks(sql);
    let Some(first) = sql.chars().next() else {
        return (Token::Other, "");
    };
    let end = match first {
        '"' | '\'' | '`' => return (Token::Quoted, after_quote(sql, first)),
        '[' => {
            let end = sql.find(']').map_or(sql.len(), |at| at + 1);
            return (Token::Quoted, &sql[end..]);
        }
        _ => sql
            .find(|c: char| c.is_ascii() && !c.is_ascii_alphanumeric() && c != '_' && c != '$')
            .unwrap_or(sql.len()),
    };
    match end {
        0 => (Token::Other, &sql[first.len_utf8()..]),
        _ => (Token::Word(&sql[..end]), &sql[end..]),
    }
}

fn skip_blanks(mut sql: &str) -> &str {
    loop {
        let blank = |c: char| c.is_ascii_whitespace() || c == ';' || c == '\u{feff}';
        let trimmed = sql.trim_start_matches(blank);
        let rest = match trimmed.get(..2) {
            Some("--") => trimmed.find('\n').map_or("", |at| &trimmed[at..]),
            Some("/*") => trimmed[2..].find("*/").map_or("", |at| &trimmed[at + 4..]),
            _ => return trimmed,
        };
        sql = rest;
    }
}

/// What follows a quoted name or text; a doubled quote is part of it.
fn after_quote(sql: &str, quote: char) -> &str {
    let mut rest = &sql[1..];
    loop {
        let Some(at) = rest.find(quote) else {
            return "";
        };
        rest = &rest[at + 1..];
        match rest.strip_prefix(quote) {
            Some(inside) => rest = inside,
            None => return rest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_vacuum_into_is_taken_for_it() {
        // Broken: a database that an application makes would not be protected, or every copy would.
        for sql in [
            "VACUUM INTO 'x'",
            "vacuum into ?",
            " \n;; vAcUuM/**/main -- to\n INTO'x'",
            "/* a */ -- b\n VACUUM \"a \"\" b\"INTO 'x'",
            "VACUUM [into]into 'x'",
            "VACUUM `t`\tINTO f(1)",
        ] {
            assert!(is_vacuum_into(sql), "{sql}");
        }
        for sql in [
            "",
            "VACUUM",
            "VACUUM main",
            "VACUUM; -- INTO 'x'",
            "VACUUM 'INTO'",
            "EXPLAIN VACUUM INTO 'x'",
            "INSERT INTO t VALUES ('VACUUM INTO')",
            "-- VACUUM INTO 'x'",
            "/* VACUUM INTO",
            "'VACUUM' INTO",
            "VACUUMED INTO",
            "VACUUM \"x",
            "é",
        ] {
            assert!(!is_vacuum_into(sql), "{sql}");
        }
    }
}
