//! Damage to valid bytes, for the targets that read what was written.

/// Bytes that are written at an offset; none cut the end off there.
pub type Edit = (u32, Vec<u8>);

/// Applies edits to bytes, in order. Offsets wrap around at the end.
pub fn edit(bytes: &mut Vec<u8>, edits: &[Edit]) {
    for (offset, with) in edits {
        let at = *offset as usize % (bytes.len() + 1);
        if with.is_empty() {
            bytes.truncate(at);
        } else {
            let end = (at + with.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&with[..end - at]);
        }
    }
}
