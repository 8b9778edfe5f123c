//! A store in memory that gives out what it was given, whatever that is.

use async_trait::async_trait;
use bytes::Bytes;
use durovfs_archive::store::{Body, ObjectInfo, PutOutcome, Store, StoreError};
use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub struct MemoryStore {
    pub objects: BTreeMap<String, Bytes>,
}

impl MemoryStore {
    fn find(&self, key: &str) -> Result<&Bytes, StoreError> {
        let (store, key) = (self.url().to_owned(), key.to_owned());
        let found = self.objects.get(&key);
        found.ok_or(StoreError::NotFound { store, key })
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn put_if_absent(&self, _: &str, _: Body<'_>) -> Result<PutOutcome, StoreError> {
        Ok(PutOutcome::AlreadyThere)
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        self.find(key).cloned()
    }

    async fn get_range(&self, key: &str, start: u64, length: u64) -> Result<Bytes, StoreError> {
        let bytes = self.find(key)?;
        let end = start.checked_add(length);
        let end = end.filter(|end| *end <= bytes.len() as u64);
        let end = end.ok_or_else(|| StoreError::Invalid("beyond the end".into()))?;
        Ok(bytes.slice(start as usize..end as usize))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let of_prefix = self
            .objects
            .iter()
            .filter(|(key, _)| key.starts_with(prefix));
        let info = |(key, bytes): (&String, &Bytes)| ObjectInfo {
            key: key.clone(),
            size: bytes.len() as u64,
        };
        Ok(of_prefix.map(info).collect())
    }

    async fn list_folders(&self, _: &str) -> Result<Vec<String>, StoreError> {
        Ok(Vec::new())
    }

    async fn delete(&self, _: &[String]) -> Result<(), StoreError> {
        Ok(())
    }

    async fn check(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn url(&self) -> &str {
        "memory:"
    }
}
