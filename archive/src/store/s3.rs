//! An S3 bucket as object store, through rust-s3.
//!
//! Repetition, time limits and their errors are decided here: the client's own are switched off.
//! A put that is repeated after a lost answer may meet its own object, and says so.

use super::{Body, MAX_LISTED_OBJECTS, ObjectInfo, PutOutcome, S3Options, Store, StoreError};
use super::{check_key, decode_percent};
use async_trait::async_trait;
use bytes::Bytes;
use s3::creds::Credentials;
use s3::error::S3Error;
use s3::serde_types::{ListBucketResult, ObjectIdentifier};
use s3::{Bucket, Region};
use std::path::Path;
use std::time::Duration;

/// Largest object that is put in one conditional request, for which the client holds it in memory
/// twice. Above it goes up in parts, of which the client holds [`PARTS_IN_FLIGHT`].
const MAX_SINGLE_PUT_BYTES: u64 = 24 << 20;
const PARTS_IN_FLIGHT: usize = 2;
/// Keys in one deletion request: what S3 allows.
const MAX_DELETED_AT_ONCE: usize = 1000;
/// First pause before a request is repeated; each further one is four times as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Longest piece of a server's answer that goes into an error.
const MAX_DETAIL_CHARS: usize = 200;

#[derive(Debug)]
pub(super) struct S3Store {
    bucket: Box<Bucket>,
    /// Ends in a slash, unless empty.
    prefix: String,
    url: String,
    attempts: u32,
}

/// What the URL says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Location {
    bucket: String,
    prefix: String,
    endpoint: Option<String>,
    region: Option<String>,
    path_style: Option<bool>,
    profile: Option<String>,
}

impl Location {
    fn parse(rest: &str) -> Result<Self, StoreError> {
        let invalid = |why: String| StoreError::Invalid(format!("archive URL s3://{rest}: {why}"));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
        if bucket.is_empty() {
            return Err(invalid("no bucket".into()));
        }
        let prefix = decode_percent(prefix.trim_end_matches('/'))?;
        let mut location = Self {
            bucket: bucket.into(),
            ..Self::default()
        };
        if !prefix.is_empty() {
            check_key(&prefix)?;
            location.prefix = format!("{prefix}/");
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode_percent(value)?;
            match key {
                "endpoint" => location.endpoint = Some(value),
                "region" => location.region = Some(value),
                "profile" => location.profile = Some(value),
                "path_style" => {
                    let parsed = value.parse();
                    location.path_style =
                        Some(parsed.map_err(|_| invalid("path_style is true or false".into()))?);
                }
                _ => return Err(invalid(format!("unknown parameter {key:?}"))),
            }
        }
        Ok(location)
    }

    fn region(&self) -> Result<Region, StoreError> {
        let from_environment = || {
            ["AWS_REGION", "AWS_DEFAULT_REGION"]
                .iter()
                .find_map(|name| std::env::var(name).ok())
        };
        let region = self.region.clone().or_else(from_environment);
        match (&self.endpoint, region) {
            (Some(endpoint), region) => Ok(Region::Custom {
                // Services other than AWS sign with this one unless told otherwise.
                region: region.unwrap_or_else(|| "us-east-1".into()),
                endpoint: endpoint.clone(),
            }),
            (None, Some(region)) => region.parse().map_err(|_| {
                StoreError::Invalid(format!("archive URL: unknown region {region:?}"))
            }),
            (None, None) => Err(StoreError::Invalid(
                "archive URL: add ?region=NAME (or ?endpoint=URL), or set AWS_REGION".into(),
            )),
        }
    }
}

impl S3Store {
    pub(super) fn open(rest: &str, options: &S3Options) -> Result<Self, StoreError> {
        let location = Location::parse(rest)?;
        let region = location.region()?;
        let profile = location.profile.as_deref();
        let found = match profile {
            Some(_) => Credentials::from_profile(profile),
            None => Credentials::default(),
        };
        let credentials = found.map_err(|error| {
            StoreError::Invalid(format!(
                "archive URL s3://{}: no credentials ({error}): set AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY, or a profile",
                location.bucket
            ))
        })?;
        // Which requests may be repeated is decided by `Self::repeat`.
        s3::set_retries(0);
        let bucket = Bucket::new(&location.bucket, region, credentials)
            .and_then(|bucket| bucket.with_request_timeout(options.request_timeout))
            .map_err(|error| StoreError::Invalid(format!("archive URL s3://{rest}: {error}")))?;
        let path_style = options.path_style.or(location.path_style);
        let bucket = match path_style.unwrap_or(location.endpoint.is_some()) {
            true => bucket.with_path_style(),
            false => bucket,
        };
        let attempts = options.attempts.max(1);
        Ok(Self {
            bucket,
            prefix: location.prefix,
            url: format!("s3://{rest}"),
            attempts,
        })
    }

    fn full_key(&self, key: &str) -> Result<String, StoreError> {
        check_key(key)?;
        Ok(format!("{}{key}", self.prefix))
    }

    fn error(&self, action: &str, key: &str, error: &S3Error) -> StoreError {
        let (store, action) = (self.url.clone(), action.to_owned());
        match status_of(error) {
            // A missing bucket is no missing object.
            Some(404) if !key.is_empty() && !is_missing_bucket(error) => StoreError::NotFound {
                store,
                key: key.to_owned(),
            },
            Some(401 | 403) => StoreError::Denied {
                store,
                action,
                detail: detail(error),
            },
            _ => StoreError::Unavailable {
                store,
                action,
                detail: detail(error),
            },
        }
    }

    /// Sends a request until it is answered for good, with growing pauses.
    async fn repeat<T, F>(&self, mut send: impl FnMut() -> F) -> Result<T, S3Error>
    where
        F: Future<Output = Result<T, S3Error>>,
    {
        let mut pause = FIRST_PAUSE;
        for _ in 1..self.attempts {
            match send().await {
                Err(error) if is_passing(&error) => {
                    tracing::debug!(store = self.url, error = %detail(&error), "repeat a request");
                    tokio::time::sleep(pause).await;
                    pause *= 4;
                }
                answered => return answered,
            }
        }
        send().await
    }

    async fn put_once(&self, key: &str, bytes: &[u8]) -> Result<PutOutcome, S3Error> {
        let request = self
            .bucket
            .put_object_builder(key, bytes)
            .with_header("If-None-Match", "*")?;
        match request.execute().await {
            Ok(_) => Ok(PutOutcome::Created),
            Err(error) if status_of(&error) == Some(412) => Ok(PutOutcome::AlreadyThere),
            Err(error) => Err(error),
        }
    }

    async fn put_in_parts(&self, key: &str, path: &Path) -> Result<PutOutcome, S3Error> {
        // Some services ignore the condition when an upload in parts is completed.
        match self.bucket.head_object(key).await {
            Ok(_) => return Ok(PutOutcome::AlreadyThere),
            Err(error) if status_of(&error) == Some(404) => {}
            Err(error) => return Err(error),
        }
        let mut file = tokio::fs::File::open(path).await?;
        let mut headers = self.bucket.extra_headers().clone();
        headers.insert("if-none-match", "*".parse()?);
        let request = self
            .bucket
            .put_object_stream_builder(key)
            .with_max_concurrent_chunks(PARTS_IN_FLIGHT)
            .with_headers(headers);
        match request.execute_stream(&mut file).await {
            Ok(_) => Ok(PutOutcome::Created),
            Err(error) if status_of(&error) == Some(412) => Ok(PutOutcome::AlreadyThere),
            Err(error) => Err(error),
        }
    }

    async fn list_pages(
        &self,
        prefix: &str,
        delimiter: Option<&str>,
        mut take: impl FnMut(ListBucketResult) -> usize + Send,
    ) -> Result<(), StoreError> {
        let full = format!("{}{prefix}", self.prefix);
        let action = format!("list {prefix}");
        let mut token = None;
        loop {
            let send = || {
                let delimiter = delimiter.map(str::to_owned);
                self.bucket
                    .list_page(full.clone(), delimiter, token.clone(), None, None)
            };
            let page = self.repeat(send).await;
            let (page, _) = page.map_err(|error| self.error(&action, "", &error))?;
            let more = page.is_truncated;
            token.clone_from(&page.next_continuation_token);
            if take(page) > MAX_LISTED_OBJECTS {
                let detail = format!("more than {MAX_LISTED_OBJECTS} objects");
                return Err(StoreError::Unavailable {
                    store: self.url.clone(),
                    action,
                    detail,
                });
            }
            if !more || token.is_none() {
                return Ok(());
            }
        }
    }
}

#[async_trait]
impl Store for S3Store {
    async fn put_if_absent(&self, key: &str, body: Body<'_>) -> Result<PutOutcome, StoreError> {
        let full = self.full_key(key)?;
        let local = |error: std::io::Error| {
            let action = format!("put {key}");
            let detail = format!("read the local file: {error}");
            StoreError::Unavailable {
                store: self.url.clone(),
                action,
                detail,
            }
        };
        let bytes = match body {
            Body::Bytes(bytes) => bytes,
            Body::File(path) => {
                let length = tokio::fs::metadata(path).await.map_err(local)?.len();
                if length > MAX_SINGLE_PUT_BYTES {
                    let sent = self.repeat(|| self.put_in_parts(&full, path)).await;
                    return sent.map_err(|error| self.error(&format!("put {key}"), "", &error));
                }
                Bytes::from(tokio::fs::read(path).await.map_err(local)?)
            }
        };
        let sent = self.repeat(|| self.put_once(&full, &bytes)).await;
        sent.map_err(|error| self.error(&format!("put {key}"), "", &error))
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        let full = self.full_key(key)?;
        let got = self.repeat(|| self.bucket.get_object(&full)).await;
        got.map(|response| response.bytes().clone())
            .map_err(|error| self.error(&format!("get {key}"), key, &error))
    }

    async fn get_range(&self, key: &str, start: u64, length: u64) -> Result<Bytes, StoreError> {
        let full = self.full_key(key)?;
        let Some(last) = length
            .checked_sub(1)
            .and_then(|more| start.checked_add(more))
        else {
            return Ok(Bytes::new());
        };
        let action = format!("get bytes {start} to {last} of {key}");
        let got = self
            .repeat(|| self.bucket.get_object_range(&full, start, Some(last)))
            .await;
        let response = got.map_err(|error| self.error(&action, key, &error))?;
        let bytes = response.bytes().clone();
        // A service that ignores ranges would give something else under the same name.
        if bytes.len() as u64 != length {
            let detail = format!("got {} bytes", bytes.len());
            return Err(StoreError::Unavailable {
                store: self.url.clone(),
                action,
                detail,
            });
        }
        Ok(bytes)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let mut found = Vec::new();
        let skip = self.prefix.len();
        self.list_pages(prefix, None, |page| {
            found.extend(page.contents.into_iter().filter_map(|object| {
                let key = object.key.get(skip..)?.to_owned();
                Some(ObjectInfo {
                    key,
                    size: object.size,
                })
            }));
            found.len()
        })
        .await?;
        found.sort();
        Ok(found)
    }

    async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let mut found = Vec::new();
        let skip = self.prefix.len() + prefix.len();
        self.list_pages(prefix, Some("/"), |page| {
            for common in page.common_prefixes.unwrap_or_default() {
                let name = common
                    .prefix
                    .get(skip..)
                    .and_then(|name| name.strip_suffix('/'));
                found.extend(name.map(str::to_owned));
            }
            found.len()
        })
        .await?;
        found.sort();
        Ok(found)
    }

    async fn delete(&self, keys: &[String]) -> Result<(), StoreError> {
        for keys in keys.chunks(MAX_DELETED_AT_ONCE) {
            let full = keys
                .iter()
                .map(|key| self.full_key(key))
                .collect::<Result<Vec<_>, _>>()?;
            let objects: Vec<_> = full.into_iter().map(ObjectIdentifier::new).collect();
            let action = format!("delete {} objects", keys.len());
            let sent = self
                .repeat(|| self.bucket.delete_objects(objects.clone()))
                .await;
            let answer = sent.map_err(|error| self.error(&action, "", &error))?;
            if let Some(refused) = answer.errors.first() {
                let detail = format!("{}: {}", refused.key, refused.message);
                return Err(StoreError::Unavailable {
                    store: self.url.clone(),
                    action,
                    detail,
                });
            }
        }
        Ok(())
    }

    async fn check(&self) -> Result<(), StoreError> {
        let send = || {
            self.bucket
                .list_page(self.prefix.clone(), None, None, None, Some(1))
        };
        match self.repeat(send).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.error("open the archive", "", &error)),
        }
    }

    fn url(&self) -> &str {
        &self.url
    }
}

fn status_of(error: &S3Error) -> Option<u16> {
    match error {
        S3Error::HttpFailWithBody(status, _) => Some(*status),
        _ => None,
    }
}

fn is_missing_bucket(error: &S3Error) -> bool {
    matches!(error, S3Error::HttpFailWithBody(_, body) if body.contains("NoSuchBucket"))
}

/// Whether the same request may be answered differently a moment later.
fn is_passing(error: &S3Error) -> bool {
    match error {
        // 409: another conditional put of this key is under way.
        S3Error::HttpFailWithBody(status, body) => {
            matches!(status, 408 | 409 | 429 | 500..=599) && !body.contains("NotImplemented")
        }
        S3Error::Reqwest(error) => !error.is_builder(),
        S3Error::Io(error) => error.kind() != std::io::ErrorKind::NotFound,
        _ => false,
    }
}

/// What went wrong, on one line. Service errors are XML of which the code and message matter.
fn detail(error: &S3Error) -> String {
    let text = match error {
        S3Error::HttpFailWithBody(status, body) => {
            let element = |name: &str| {
                let (_, rest) = body.split_once(&format!("<{name}>"))?;
                rest.split_once(&format!("</{name}>"))
                    .map(|(value, _)| value)
            };
            match (element("Code"), element("Message")) {
                (Some(code), Some(message)) if !message.is_empty() => {
                    format!("HTTP {status} {code}: {message}")
                }
                (Some(code), _) => format!("HTTP {status} {code}"),
                (None, _) => format!("HTTP {status}: {body}"),
            }
        }
        other => {
            // The innermost two say what happened ("tcp connect error: connection refused"); the
            // outer ones repeat the URL.
            let mut causes = vec![other.to_string()];
            let mut cause = std::error::Error::source(other);
            while let Some(inner) = cause {
                causes.push(inner.to_string());
                cause = inner.source();
            }
            causes[causes.len().saturating_sub(2)..].join(": ")
        }
    };
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .take(MAX_DETAIL_CHARS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Broken: a typing error in the URL would be ignored, and the archive be somewhere else.
    #[test]
    fn urls_say_all_and_unknown_parameters_are_refused() {
        let url = "b/a/p%C3%BC?endpoint=http://h:1&region=r&path_style=false&profile=x";
        assert!(
            Location::parse(url).is_err(),
            "a prefix outside ASCII is no key"
        );
        let location = Location::parse("b/a/p/?endpoint=http%3A//h:1&region=r&path_style=false");
        let expected = Location {
            bucket: "b".into(),
            prefix: "a/p/".into(),
            endpoint: Some("http://h:1".into()),
            region: Some("r".into()),
            path_style: Some(false),
            profile: None,
        };
        assert_eq!(location.unwrap(), expected);
        assert_eq!(Location::parse("b").unwrap().prefix, "");
        for bad in ["", "/p", "b?regoin=x", "b?path_style=yes", "b/../c"] {
            assert!(Location::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn errors_of_a_service_fit_one_line() {
        let body = "<?xml?>\n<Error><Code>SlowDown</Code><Message>too\nfast</Message></Error>";
        let error = S3Error::HttpFailWithBody(503, body.into());
        assert!(is_passing(&error));
        assert_eq!(detail(&error), "HTTP 503 SlowDown: too fast");
        let error = S3Error::HttpFailWithBody(403, "x".repeat(9999));
        assert!(!is_passing(&error));
        assert_eq!(detail(&error).chars().count(), MAX_DETAIL_CHARS);
    }
}
