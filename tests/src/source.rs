//! Rust source as the tidy test sees it: comments and literals blanked out, test code cut away,
//! functions found by their braces. Not a parser: it relies on the code being formatted.

/// A function: where it begins, and how long it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Line of its signature, from 1.
    pub line: usize,
    /// Lines from signature to closing brace.
    pub lines: usize,
}

/// The text with everything inside comments, strings and character literals replaced by blanks.
pub fn blank_literals(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => line_end(bytes, at),
            b'/' if bytes[at..].starts_with(b"/*") => find(bytes, at + 2, b"*/") + 2,
            b'r' if raw_string(bytes, at).is_some() && !follows_word(bytes, at) => {
                raw_string(bytes, at).unwrap_or(at + 1)
            }
            b'"' => string_end(bytes, at),
            b'\'' => char_end(bytes, at).unwrap_or(at + 1),
            _ => {
                at += 1;
                continue;
            }
        };
        let end = end.min(bytes.len());
        if end > at + 1 {
            out[at..end]
                .iter_mut()
                .filter(|byte| **byte != b'\n')
                .for_each(|byte| *byte = b' ');
        }
        at = end;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn follows_word(bytes: &[u8], at: usize) -> bool {
    at > 0
        && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_')
        && bytes[at - 1] != b'b'
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..]
        .iter()
        .position(|byte| *byte == b'\n')
        .map_or(bytes.len(), |length| at + length)
}

fn find(bytes: &[u8], from: usize, what: &[u8]) -> usize {
    let rest = bytes.get(from..).unwrap_or_default();
    rest.windows(what.len())
        .position(|window| window == what)
        .map_or(bytes.len(), |at| from + at)
}

fn string_end(bytes: &[u8], at: usize) -> usize {
    let mut at = at + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn raw_string(bytes: &[u8], at: usize) -> Option<usize> {
    let hashes = bytes[at + 1..]
        .iter()
        .take_while(|byte| **byte == b'#')
        .count();
    if bytes.get(at + 1 + hashes) != Some(&b'"') {
        return None;
    }
    let mut close = vec![b'"'];
    close.resize(1 + hashes, b'#');
    Some(find(bytes, at + 2 + hashes, &close) + close.len())
}

/// End of a character literal; none for a lifetime.
fn char_end(bytes: &[u8], at: usize) -> Option<usize> {
    if bytes.get(at + 1) == Some(&b'\\') {
        // The escaped character may itself be a quote.
        return Some(find(bytes, at + 3, b"'") + 1);
    }
    let rest = std::str::from_utf8(bytes.get(at + 1..)?).ok()?;
    let width = rest.chars().next()?.len_utf8();
    (bytes.get(at + 1 + width) == Some(&b'\'')).then_some(at + width + 2)
}

/// The lines before the file's test module, which stands last.
pub fn without_tests(text: &str) -> String {
    let mut kept = String::new();
    let lines: Vec<&str> = text.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        let mut after = lines[index + 1..]
            .iter()
            .skip_while(|line| line.starts_with("#["));
        let opens = |line: &&str| line.contains("mod ") && line.ends_with('{');
        if *line == "#[cfg(test)]" && after.next().is_some_and(opens) {
            break;
        }
        kept.push_str(line);
        kept.push('\n');
    }
    kept
}

/// All functions with a body, in a text whose literals are blanked.
pub fn functions(blanked: &str) -> Vec<Function> {
    let lines: Vec<&str> = blanked.lines().collect();
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else {
            continue;
        };
        if let Some(length) = body_length(&lines[index..]) {
            found.push(Function {
                name,
                line: index + 1,
                lines: length,
            });
        }
    }
    found
}

/// The name when a line begins a function, not a function type.
fn function_name(line: &str) -> Option<String> {
    let (before, after) = line.split_once("fn ")?;
    let keywords = ["pub", "async", "const", "unsafe", "extern", "default"];
    let keyword = |word: &str| keywords.contains(&word) || word.starts_with("pub(");
    if !before.split_whitespace().all(keyword) {
        return None;
    }
    let name: String = after
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect();
    (!name.is_empty()).then_some(name)
}

/// Lines up to the brace that closes the first one; none when a semicolon comes first.
fn body_length(lines: &[&str]) -> Option<usize> {
    let mut depth = 0usize;
    let mut brackets = 0usize;
    for (index, line) in lines.iter().enumerate() {
        for character in line.chars() {
            match character {
                '{' => depth += 1,
                '}' if depth <= 1 => return Some(index + 1),
                '}' => depth -= 1,
                '[' | '(' if depth == 0 => brackets += 1,
                ']' | ')' if depth == 0 => brackets = brackets.saturating_sub(1),
                ';' if depth == 0 && brackets == 0 => return None,
                _ => {}
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_comments_are_blanked_and_lines_are_kept() {
        // Broken: a brace in a string would make every length wrong, and tidy would pass anything.
        let text = "let a = \"{\\\"\"; // {\nlet b = '{'; let c: &'static str = r#\"}\"#;\n/* { */";
        let blanked = blank_literals(text);
        assert!(!blanked.contains(['{', '}', '"']), "{blanked}");
        assert_eq!(blanked.lines().count(), 3);
        assert!(blanked.contains("'static str"));
    }

    #[test]
    fn functions_are_measured_from_signature_to_brace() {
        // Broken: long functions would not be found.
        let text = "trait T {\n    fn none(&self);\n}\n\
                    pub(crate) async fn two(\n    a: [u8; 2],\n) {\n    \
                    if true {\n    }\n}\nlet f: fn (u8) = x;\n";
        let found = functions(&blank_literals(text));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(
            (found[0].name.as_str(), found[0].line, found[0].lines),
            ("two", 4, 6)
        );
    }

    #[test]
    fn the_test_module_is_cut_away() {
        // Broken: files would be measured with their tests, or code after them not at all.
        assert_eq!(without_tests("a\n#[cfg(test)]\nmod tests {\nb\n}\n"), "a\n");
        assert_eq!(
            without_tests("a\n#[cfg(test)]\nmod tests;\nb\n")
                .lines()
                .count(),
            4
        );
    }
}
