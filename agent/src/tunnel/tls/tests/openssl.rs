//! Against OpenSSL's programs, over loopback.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::*;

/// What a line must say before it counts, in either direction.
const WORD: &str = "mesh";

/// `openssl s_server` or `s_client`, killed when dropped.
struct Program {
    _child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(dir: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new("openssl")
            .args(arguments)
            .args(["-cert", "own.pem", "-key", "own.key", "-CAfile", "root.pem"])
            .args(["-tls1_3", "-alpn", "h2", "-verify_return_error"])
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| unreachable!("openssl(1): {error}"));
        Self {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            _child: child,
        }
    }

    async fn type_in(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).await.unwrap();
    }

    /// Reads on to a line that begins like this, and gives the rest of it.
    async fn line(&mut self, begin: &str) -> String {
        let lines = async {
            loop {
                let mut line = String::new();
                let length = self.output.read_line(&mut line).await.unwrap();
                assert_ne!(length, 0, "no line began with {begin:?}");
                if let Some(rest) = line.strip_prefix(begin) {
                    return rest.trim_end().to_owned();
                }
            }
        };
        within(lines).await
    }
}

/// A mesh, and a folder with OpenSSL's part of it.
fn files(own: &str) -> (Mesh, TempDir) {
    let mesh = Mesh::new();
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = mesh.issue(own, Duration::from_secs(3600));
    for (name, text) in [
        ("root.pem", mesh.root_pem()),
        ("own.pem", certificate.pem()),
        ("own.key", key.serialize_pem()),
    ] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    (mesh, dir)
}

/// Our client with `openssl s_server`, which asks for its certificate.
async fn to_server(mesh: &Mesh, dir: &Path, more: &[&str]) -> (TlsStream<TcpStream>, Program) {
    let arguments = ["s_server", "-accept", "127.0.0.1:0", "-Verify", "2"];
    let mut server = Program::start(dir, &[&arguments, more].concat());
    let address: SocketAddr = server.line("ACCEPT ").await.parse().unwrap();
    let socket = TcpStream::connect(address).await.unwrap();
    let client = mesh.certificate(CLIENT).client.clone();
    let shaken = within(connect(client, name(), socket)).await.unwrap();
    assert_eq!(shaken.session().alpn_protocol(), Some(&b"h2"[..]));
    (shaken.into_stream().unwrap(), server)
}

/// `openssl s_client` with our server, which asks for its certificate.
async fn from_client(mesh: &Mesh, dir: &Path, more: &[&str]) -> (TlsStream<TcpStream>, Program) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let arguments = ["s_client", "-connect", &address];
    let client = Program::start(dir, &[&arguments, more].concat());
    let (socket, _) = within(listener.accept()).await.unwrap();
    let server = mesh.certificate(SERVER).server.clone();
    let shaken = within(accept(server, socket)).await.unwrap();
    assert!(shaken.session().peer_certificates().is_some());
    (shaken.into_stream().unwrap(), client)
}

/// A line from each to the other.
async fn exchange(ours: &mut TlsStream<TcpStream>, theirs: &mut Program, number: usize) {
    theirs.type_in(&format!("{WORD} {number}\n")).await;
    let mut got = vec![0; format!("{WORD} {number}\n").len()];
    within(ours.read_exact(&mut got)).await.unwrap();
    assert_eq!(got, format!("{WORD} {number}\n").into_bytes());
    let answer = format!("{WORD}-{number}\n");
    ours.write_all(answer.as_bytes()).await.unwrap();
    ours.flush().await.unwrap();
    assert_eq!(theirs.line(&format!("{WORD}-")).await, number.to_string());
}

/// Has it update its keys: a letter is a command if it comes alone, so what it does is awaited.
async fn command(ours: &mut TlsStream<TcpStream>, theirs: &mut Program, letter: &str) {
    theirs.type_in(&format!("{letter}\n")).await;
    let updated = std::future::poll_fn(|cx| {
        let read = Pin::new(&mut *ours).poll_read(cx, &mut ReadBuf::new(&mut [0]));
        assert!(read.is_pending(), "there was no data");
        match ours.idle_messages {
            0 => Poll::Pending,
            _ => Poll::Ready(()),
        }
    });
    within(updated).await;
}

#[tokio::test]
async fn keys_are_updated_by_openssl_in_either_role_and_by_us() {
    let (mesh, dir) = files(SERVER);
    let (mut ours, mut theirs) = to_server(&mesh, dir.path(), &["-num_tickets", "8"]).await;
    update_keys(&mut ours, &mut theirs).await;
    let (mesh, dir) = files(CLIENT);
    let (mut ours, mut theirs) = from_client(&mesh, dir.path(), &[]).await;
    update_keys(&mut ours, &mut theirs).await;
}

async fn update_keys(ours: &mut TlsStream<TcpStream>, theirs: &mut Program) {
    exchange(ours, theirs, 0).await;
    for round in 1..=3 {
        for letter in ["k", "K"] {
            command(ours, theirs, letter).await;
            exchange(ours, theirs, round).await;
        }
        ours.outgoing.update_key_for_test(&mut ours.keys);
        exchange(ours, theirs, 10 + round).await;
    }
}

#[tokio::test]
async fn openssl_is_served_small_and_large_records_and_ends_in_order() {
    let (mesh, dir) = files(SERVER);
    let body = pattern(3_000_017);
    let response = [&b"HTTP/1.0 200 OK\r\n\r\n"[..], &body].concat();
    std::fs::write(dir.path().join("large"), &response).unwrap();
    for size in ["512", "1000", "16384"] {
        let more = ["-HTTP", "-http_server_binmode", "-max_send_frag", size];
        let (mut ours, _theirs) = to_server(&mesh, dir.path(), &more).await;
        ours.write_all(b"GET /large HTTP/1.0\r\n\r\n")
            .await
            .unwrap();
        ours.flush().await.unwrap();
        let mut got = Vec::new();
        // Which it does only after close_notify.
        within(ours.read_to_end(&mut got)).await.unwrap();
        assert!(got.ends_with(&body), "{size}: {}", got.len());
    }
}

#[tokio::test]
async fn openssl_takes_all_that_we_write_and_our_end() {
    let (mesh, dir) = files(CLIENT);
    let (mut ours, mut theirs) = from_client(&mesh, dir.path(), &["-quiet"]).await;
    // Lines, so that it can be told from what the program says of itself.
    let line = [&[b'x'; 99][..], b"\n"].concat();
    let write = async {
        for _ in 0..300 {
            ours.write_all(&line.repeat(100)).await.unwrap();
        }
        ours.shutdown().await.unwrap();
    };
    let read = async {
        let mut got = Vec::new();
        theirs.output.read_to_end(&mut got).await.unwrap();
        got
    };
    let ((), got) = within(async { tokio::join!(write, read) }).await;
    let whole = got.split(|byte| *byte == b'\n');
    assert_eq!(whole.filter(|one| **one == line[..99]).count(), 30_000);
}

#[tokio::test]
async fn openssl_without_a_certificate_or_killed_is_not_taken_for_more_than_that() {
    let (mesh, dir) = files(CLIENT);
    let (mut ours, theirs) = from_client(&mesh, dir.path(), &["-ign_eof"]).await;
    drop(theirs);
    // Killed, it had no time for close_notify.
    let error = within(ours.read_u8()).await.unwrap_err();
    let cut = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset];
    assert!(cut.contains(&error.kind()), "{error}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let _stranger = Command::new("openssl")
        .args(["s_client", "-connect", &address, "-tls1_3", "-ign_eof"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let (socket, _) = within(listener.accept()).await.unwrap();
    let server = mesh.certificate(SERVER).server.clone();
    let error = within(accept(server, socket)).await.err().unwrap();
    assert_eq!(*tls_error(&error), Error::NoCertificatesPresented);
}
