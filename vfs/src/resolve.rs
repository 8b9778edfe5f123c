//! The way out of a refusal: what a person types when the local file and its log have parted.

use std::path::Path;

/// The commands between which a person decides, ready to be pasted.
pub(crate) fn way_out(path: &Path, name: &str) -> String {
    let path = path.to_string_lossy();
    let mut command = format!("durovfs resolve {}", quoted(&path));
    if name != path {
        command.push_str(&format!(" --name {}", quoted(name)));
    }
    format!(
        "`{command} --keep log` (or `--keep local`) decides which of the two is given up, and \
         saves it beside"
    )
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    if !word.is_empty() && !word.starts_with('-') && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_can_be_pasted() {
        // Broken: the one line that leads out of a refusal would do something else.
        let plain = way_out(Path::new("/srv/app.db"), "/srv/app.db");
        assert!(plain.starts_with("`durovfs resolve /srv/app.db --keep log` (or"));
        let named = way_out(Path::new("/srv/my app's.db"), "shop; rm");
        assert!(
            named.starts_with(
                r"`durovfs resolve '/srv/my app'\''s.db' --name 'shop; rm' --keep log`"
            ),
            "{named}"
        );
    }
}
