//! Tests of the configuration: what is accepted, and that each refusal names the file and the key.

use super::*;

const SIDECAR: &str = r#"
node = "primary"
listen = "127.0.0.1:4001"
data = "data"
replicas = ["replica-1", "replica-2", "replica-3"]

[tls]
ca = "../../ca.pem"
certificate = "node.pem"
key = "/keys/node.key"

[[nodes]]
name = "primary"
address = "127.0.0.1:4001"
[[nodes]]
name = "replica-1"
address = "a.example:4002"
[[nodes]]
name = "replica-2"
address = "127.0.0.1:4003"
[[nodes]]
name = "replica-3"
address = "[::1]:4004"

[archive]
url = "s3://bucket/prefix"
chunk_interval = "500ms"
chunk_bytes = "1MiB"
"#;

fn parse(text: &str) -> Result<SidecarConfig, ConfigError> {
    SidecarConfig::parse(
        &Source {
            file: Path::new("/c/nodes/primary/sidecar.toml"),
        },
        text,
    )
}

#[test]
fn a_whole_sidecar_config_is_read_with_paths_relative_to_its_file() {
    // Broken: a sidecar would keep its journal, or look for its key, in whatever directory it was
    // started from.
    let config = parse(SIDECAR).unwrap();
    assert_eq!(config.data, Path::new("/c/nodes/primary/data"));
    assert_eq!(config.tls.ca, Path::new("/c/nodes/primary/../../ca.pem"));
    assert_eq!(config.tls.key, Path::new("/keys/node.key"));
    assert_eq!(config.ack_quorum, 2);
    assert_eq!(config.replicas.len(), 3);
    assert_eq!(config.journal.limit_bytes, DEFAULT_JOURNAL_LIMIT_BYTES);
    let archive = config.archive.unwrap();
    assert_eq!(archive.chunk_interval, Duration::from_millis(500));
    assert_eq!(archive.chunk_bytes, 1 << 20);
}

#[test]
fn each_refusal_names_the_file_and_the_key() {
    // Broken: an operator with a typo would have to guess which of a hundred lines it is in, or a
    // cluster would start with a quorum that protects nothing.
    let cases = [
        (
            "node = \"primary\"",
            "node = \"other\"",
            "key node: other is not among nodes",
        ),
        (
            "node = \"primary\"",
            "node = \"../x\"",
            "key node: node name \"../x\"",
        ),
        ("127.0.0.1:4001\"\ndata", "nowhere\"\ndata", "key listen"),
        (
            "\"replica-3\"]",
            "\"replica-9\"]",
            "key replicas: replica-9 is not among nodes",
        ),
        (
            "\"replica-3\"]",
            "\"replica-1\"]",
            "key replicas: replica-1 is listed twice",
        ),
        (
            "\n[tls]",
            "ack_quorum = 1\n[tls]",
            "key ack_quorum: 1 of 3 replicas; use 2 to 3",
        ),
        ("\n[tls]", "ack_quorum = 4\n[tls]", "key ack_quorum: 4 of 3"),
        (
            "\n[tls]",
            "colour = 1\n[tls]",
            "line 6: unknown field `colour`",
        ),
        ("s3://bucket/prefix", "ftp://x", "key archive.url"),
        ("s3://bucket/prefix", "file://relative", "key archive.url"),
        ("500ms", "0s", "key archive.chunk_interval"),
        ("500ms", "soon", "key archive.chunk_interval"),
        ("1MiB", "1MB", "key archive.chunk_bytes"),
        ("1MiB", "1", "key archive.chunk_bytes"),
        ("a.example:4002", "a.example", "key nodes.address"),
        (
            "name = \"replica-2\"",
            "name = \"replica-1\"",
            "key nodes: replica-1 is listed twice",
        ),
    ];
    for (from, to, expected) in cases {
        assert!(SIDECAR.contains(from), "{from}");
        let text = parse(&SIDECAR.replacen(from, to, 1))
            .unwrap_err()
            .to_string();
        assert!(
            text.starts_with("config /c/nodes/primary/sidecar.toml: "),
            "{text}"
        );
        assert!(text.contains(expected), "{to}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[test]
fn a_journal_must_have_room_for_its_segments() {
    // Broken: a journal could fill up with its first segment and refuse every commit.
    let text = format!("{SIDECAR}\n[journal]\nsegment_bytes = \"8MiB\"\nlimit_bytes = \"16MiB\"\n");
    assert!(
        parse(&text)
            .unwrap_err()
            .to_string()
            .contains("key journal.limit_bytes")
    );
}

#[test]
fn a_client_config_is_found_where_the_interface_says() {
    // Broken: an application on a machine with a configured cluster would write into the
    // development cluster instead.
    let env = |name: &str| match name {
        "HOME" => Some(PathBuf::from("/home/u")),
        "XDG_STATE_HOME" => Some(PathBuf::from("/state")),
        _ => None,
    };
    let expected = [
        "/home/u/.config/durovfs/client.toml",
        "/etc/durovfs/client.toml",
        "/state/durovfs/dev/client.toml",
    ];
    assert_eq!(client_config_candidates(env), expected.map(PathBuf::from));
    let explicit = |name: &str| (name == "DUROVFS_CONFIG").then(|| PathBuf::from("/x.toml"));
    assert_eq!(find_client_config(explicit).unwrap(), Path::new("/x.toml"));
}

#[test]
fn a_client_config_is_read_and_checked() {
    // Broken: the commands would talk to a sidecar that nobody configured.
    let text = "sidecar = \"127.0.0.1:4001\"\nnode = \"primary\"\nca = \"ca.pem\"\n\
                certificate = \"client.pem\"\nkey = \"client.key\"\narchive = \"file:///a\"\n";
    let source = Source {
        file: Path::new("/c/client.toml"),
    };
    let config = ClientConfig::parse(&source, text).unwrap();
    assert_eq!(config.tls.key, Path::new("/c/client.key"));
    assert_eq!(config.archive.as_deref(), Some("file:///a"));
    let bad = text.replace("127.0.0.1:4001", "4001");
    let error = ClientConfig::parse(&source, &bad).unwrap_err().to_string();
    assert_eq!(
        error,
        "config /c/client.toml: key sidecar: \"4001\" is not HOST:PORT"
    );
}

#[test]
fn durations_and_sizes_are_read_with_their_units_only() {
    // Broken: "10" would be taken for milliseconds by one reader and for seconds by another.
    assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
    assert_eq!(parse_bytes("4 GiB"), Ok(4 << 30));
    for bad in [
        "10",
        "",
        "s",
        "-1s",
        "1.5s",
        "99999999999999999999s",
        "10 weeks",
    ] {
        assert!(parse_duration(bad).is_err(), "{bad}");
    }
    for bad in ["", "MiB", "16mb", "-1", "99999999999TiB"] {
        assert!(parse_bytes(bad).is_err(), "{bad}");
    }
}

#[test]
fn copies_are_off_unless_a_directory_is_named() {
    // Broken: a node would fill its disk with copies that nobody asked for, or lack those wanted.
    assert_eq!(parse(SIDECAR).unwrap().copies, None);
    let with = format!("{SIDECAR}\n[copies]\ndirectory = \"copies\"\nexclude = [\"**/tmp-*\"]\n");
    let copies = parse(&with).unwrap().copies.unwrap();
    assert_eq!(copies.directory, Path::new("/c/nodes/primary/copies"));
    assert_eq!(copies.exclude, ["**/tmp-*"]);
    let bad = with.replace("**/tmp-*", "a[");
    let error = parse(&bad).unwrap_err().to_string();
    assert!(error.contains("copies.exclude"), "{error}");
}
