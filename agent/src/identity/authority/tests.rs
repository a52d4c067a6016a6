//! CA, client and store together over loopback, with real files, TLS and time.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::Code;

use super::*;
use crate::identity::{
    AuthorityClient, AuthorityClientOptions, CertificateState, Certificates, CertificatesOptions,
    WorkloadCertificate, peer_identity,
};
use crate::mesh::SpiffeId;

const TOKEN: &str = "token-of-node-a-0001";
const OTHER_TOKEN: &str = "token-of-node-b-0001";
const SOON: Duration = Duration::from_secs(20);

fn id(service_account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/shop/sa/{service_account}")
        .parse()
        .unwrap()
}

/// A CA with its files.
struct Running {
    directory: tempfile::TempDir,
    address: SocketAddr,
    stop: CancellationToken,
    run: tokio::task::JoinHandle<Result<(), AuthorityError>>,
}

impl Running {
    async fn start(lifetime: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(
            directory.path().join("nodes.yaml"),
            format!(
                "nodes:\n- {{name: node-a, token: {TOKEN}, identities: [shop/web, shop/cart]}}\n\
                 - {{name: node-b, token: {OTHER_TOKEN}, identities: [shop/db]}}\n"
            ),
        )
        .unwrap();
        std::fs::write(directory.path().join("token"), format!("{TOKEN}\n")).unwrap();
        Self::start_in(directory, lifetime).await
    }

    async fn start_in(directory: tempfile::TempDir, lifetime: Duration) -> Self {
        let authority = Authority::open(AuthorityOptions {
            listen: "127.0.0.1:0".parse().unwrap(),
            state_dir: directory.path().join("state"),
            trust_domain: TrustDomain::default(),
            authenticator_file: directory.path().join("nodes.yaml"),
            certificate_lifetime: lifetime,
            server_names: vec!["ca.undermesh".to_owned()],
        })
        .await
        .unwrap();
        let stop = CancellationToken::new();
        Self {
            address: authority.address(),
            run: tokio::spawn(authority.run(stop.clone())),
            directory,
            stop,
        }
    }

    /// Stops it and gives its files back.
    async fn end(self) -> tempfile::TempDir {
        self.stop.cancel();
        self.run.await.unwrap().unwrap();
        self.directory
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn options(&self) -> AuthorityClientOptions {
        AuthorityClientOptions::new(
            &self.address.to_string(),
            &self.path("state/root.pem"),
            &self.path("token"),
        )
    }

    fn client(&self) -> AuthorityClient {
        AuthorityClient::new(self.options()).unwrap()
    }

    fn store(&self) -> (Arc<Certificates>, CancellationToken) {
        let store = Certificates::new(CertificatesOptions::new(Arc::new(self.client())));
        let stop = CancellationToken::new();
        tokio::spawn(store.clone().run(stop.clone()));
        (store, stop)
    }

    async fn refusal(&self, id: &SpiffeId) -> (Code, String) {
        use crate::identity::client::ClientError;
        match self.client().request(id).await {
            Err(ClientError::Refused { code, message }) => (code, message),
            other => panic!("not refused: {other:?}"),
        }
    }
}

#[tokio::test]
async fn an_allowed_identity_is_issued_with_the_defaults_of_the_ca() {
    let ca = Running::start(Duration::from_secs(24 * 3600)).await;
    let before = SystemTime::now();
    let certificate = ca.client().request(&id("web")).await.unwrap();
    assert_eq!(certificate.id, id("web"));
    let life = certificate.not_after.duration_since(before).unwrap();
    assert!((86_400..86_410).contains(&life.as_secs()), "{life:?}");

    let (_, parsed) = x509_parser::parse_x509_certificate(&certificate.chain()[0]).unwrap();
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && usage.server_auth && !usage.any);
    assert!(!parsed.is_ca());
    assert!(
        parsed
            .key_usage()
            .unwrap()
            .unwrap()
            .value
            .digital_signature()
    );
    let names = parsed.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical, "the subject is empty");
    assert_eq!(names.value.general_names.len(), 1);
    assert_eq!(parsed.subject().iter().count(), 0);
}

#[tokio::test]
async fn a_request_may_ask_for_less_life_but_not_for_more() {
    let ca = Running::start(Duration::from_secs(3600)).await;
    for (asked, expected) in [(5, 5), (1_000_000, 3600)] {
        let client = AuthorityClient::new(AuthorityClientOptions {
            lifetime: Some(Duration::from_secs(asked)),
            ..ca.options()
        });
        let before = SystemTime::now();
        let certificate = client.unwrap().request(&id("web")).await.unwrap();
        let life = certificate.not_after.duration_since(before).unwrap();
        let range = expected..expected + 5;
        assert!(range.contains(&life.as_secs()), "{life:?}");
    }
}

#[tokio::test]
async fn an_identity_of_another_node_or_of_no_node_is_denied() {
    let ca = Running::start(Duration::from_secs(60)).await;
    for denied in [
        id("db"),
        id("unheard-of"),
        "spiffe://cluster.local/ns/other/sa/web".parse().unwrap(),
        "spiffe://other.example/ns/shop/sa/web".parse().unwrap(),
    ] {
        let (code, message) = ca.refusal(&denied).await;
        assert_eq!(code, Code::PermissionDenied);
        assert!(message.contains("node-a") && message.contains(&denied.to_string()));
    }
}

#[tokio::test]
async fn a_wrong_token_is_denied_and_a_rotated_one_is_read_at_the_next_request() {
    let ca = Running::start(Duration::from_secs(60)).await;
    let token = ca.path("token");
    for wrong in ["token-of-nobody-0001", "x"] {
        std::fs::write(&token, wrong).unwrap();
        let (code, message) = ca.refusal(&id("web")).await;
        assert_eq!(code, Code::Unauthenticated);
        assert!(!message.contains(wrong) || wrong == "x");
    }
    std::fs::write(&token, OTHER_TOKEN).unwrap();
    assert!(ca.client().request(&id("db")).await.is_ok());
    assert_eq!(ca.refusal(&id("web")).await.0, Code::PermissionDenied);
    for unusable in ["", "two\nlines"] {
        std::fs::write(&token, unusable).unwrap();
        let error = ca.client().request(&id("db")).await.unwrap_err();
        assert!(error.to_string().contains("token file"), "{error}");
    }
}

#[tokio::test]
async fn a_ca_of_another_root_or_another_name_is_not_trusted() {
    let (ours, theirs) = (
        Running::start(Duration::from_secs(60)).await,
        Running::start(Duration::from_secs(60)).await,
    );
    let mut stranger = theirs.options();
    stranger.root_file = ours.path("state/root.pem");
    let mut misnamed = ours.options();
    misnamed.server_name = Some("istiod.istio-system.svc".to_owned());
    for options in [stranger, misnamed] {
        let client = AuthorityClient::new(options).unwrap();
        let error = client.request(&id("web")).await.unwrap_err().to_string();
        assert!(error.starts_with("TLS with the CA"), "{error}");
    }
    let mut named = ours.options();
    named.server_name = Some("ca.undermesh".to_owned());
    let client = AuthorityClient::new(named).unwrap();
    assert!(client.request(&id("web")).await.is_ok());
}

#[tokio::test]
async fn a_ca_that_does_not_answer_costs_no_more_than_the_limit() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ca = Running::start(Duration::from_secs(60)).await;
    let mut options = ca.options();
    options.address = silent.local_addr().unwrap().to_string();
    options.timeout = Duration::from_millis(300);
    let error = AuthorityClient::new(options)
        .unwrap()
        .request(&id("web"))
        .await;
    assert!(error.unwrap_err().to_string().contains("300ms"));
}

#[tokio::test]
async fn a_restart_keeps_the_key_and_with_it_the_trust_of_agents() {
    let ca = Running::start(Duration::from_secs(60)).await;
    let before = ca.client().request(&id("web")).await.unwrap();
    let root = std::fs::read(ca.path("state/root.pem")).unwrap();
    let ca = Running::start_in(ca.end().await, Duration::from_secs(60)).await;
    assert_eq!(root, std::fs::read(ca.path("state/root.pem")).unwrap());
    let key = std::fs::metadata(ca.path("state/ca-key.pem")).unwrap();
    assert_eq!(key.mode() & 0o7777, 0o600);
    let after = ca.client().request(&id("cart")).await.unwrap();
    exchange(&before, &after).await.unwrap();
}

#[tokio::test]
async fn a_changed_authenticator_is_in_force_and_a_bad_one_leaves_the_last_good() {
    let ca = Running::start(Duration::from_secs(60)).await;
    let file = ca.path("nodes.yaml");
    let good = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, good.replace("shop/cart", "shop/new")).unwrap();
    let client = ca.client();
    until(async || client.request(&id("new")).await.is_ok()).await;
    assert_eq!(ca.refusal(&id("cart")).await.0, Code::PermissionDenied);

    std::fs::write(&file, "nodes: [").unwrap();
    tokio::time::sleep(2 * RELOAD).await;
    assert!(client.request(&id("new")).await.is_ok());
    std::fs::write(&file, good).unwrap();
    until(async || client.request(&id("cart")).await.is_ok()).await;
}

#[tokio::test]
async fn a_bad_authenticator_at_start_is_an_error() {
    let ca = Running::start(Duration::from_secs(60)).await;
    std::fs::write(ca.path("nodes.yaml"), "nodes: 1").unwrap();
    let directory = ca.end().await;
    let opened = Authority::open(AuthorityOptions {
        listen: "127.0.0.1:0".parse().unwrap(),
        state_dir: directory.path().join("state"),
        trust_domain: TrustDomain::default(),
        authenticator_file: directory.path().join("nodes.yaml"),
        certificate_lifetime: Duration::from_secs(60),
        server_names: vec![],
    });
    assert!(matches!(
        opened.await,
        Err(AuthorityError::Authenticator(_))
    ));
}

#[tokio::test]
async fn other_methods_and_oversized_messages_are_refused_on_the_wire() {
    let ca = Running::start(Duration::from_secs(60)).await;
    let client = ca.client();
    let roots = client.read_roots().await.unwrap();
    let origin: http::Uri = "https://ca.undermesh".parse().unwrap();
    let (connection, _driver) = client.open(&roots).await.unwrap();
    let request = Request::new(CertificateRequest {
        csr: "x".repeat(100 * 1024),
        ..CertificateRequest::default()
    });
    // Our own side refuses to send so much; a plain gRPC client does not.
    let mut grpc = tonic::client::Grpc::with_origin(connection, origin);
    for (path, code) in [
        ("CreateCertificate", Code::OutOfRange),
        ("Other", Code::Unimplemented),
    ] {
        let path = format!("/istio.v1.auth.IstioCertificateService/{path}");
        let message = Request::new(request.get_ref().clone());
        let codec = tonic_prost::ProstCodec::<CertificateRequest, CertificateResponse>::default();
        grpc.ready().await.unwrap();
        let status = grpc.unary(message, path.parse().unwrap(), codec).await;
        assert_eq!(status.unwrap_err().code(), code);
    }
}

#[tokio::test]
async fn oversized_requests_and_doubtful_tokens_are_refused() {
    let ca = Running::start(Duration::from_secs(60)).await;
    let mut request = Request::new(CertificateRequest {
        csr: "x".repeat(100 * 1024),
        ..CertificateRequest::default()
    });
    let bearer = format!("Bearer {TOKEN}").parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    let status = certifier(&ca).create_certificate(request).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);

    // Two authorization headers: which one counts would be a guess.
    let mut request = Request::new(CertificateRequest::default());
    for token in [TOKEN, OTHER_TOKEN] {
        let bearer = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().append("authorization", bearer);
    }
    let status = certifier(&ca).create_certificate(request).unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let status = certifier(&ca)
        .create_certificate(Request::new(CertificateRequest::default()))
        .unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
}

fn certifier(ca: &Running) -> Certifier {
    let trust_domain = TrustDomain::default();
    let now = SystemTime::now();
    Certifier {
        signer: state::open(&ca.path("state"), &trust_domain, now).unwrap(),
        authenticator: Authenticator::open(&ca.path("nodes.yaml"), &trust_domain).unwrap(),
        lifetime: Duration::from_secs(60),
        trust_domain,
    }
}

#[tokio::test]
async fn a_flood_of_silent_connections_does_not_shut_out_an_agent_at_another_address() {
    let ca = Running::start(Duration::from_secs(60)).await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(ca.address).await.unwrap());
    }
    ca.client().request(&id("web")).await.unwrap();
}

#[tokio::test]
async fn certificates_of_four_seconds_are_rotated_while_not_one_handshake_fails() {
    let ca = Running::start(Duration::from_secs(4)).await;
    let (store, stop) = ca.store();
    store.want([id("web"), id("cart")].into());
    let first = store.ready(&id("web"), SOON).await.unwrap().serial.clone();
    store.ready(&id("cart"), SOON).await.unwrap();
    let done = AtomicU64::new(0);
    let handshakes = async {
        let mut serials = std::collections::BTreeSet::from([first]);
        let end = tokio::time::Instant::now() + Duration::from_secs(8);
        while tokio::time::Instant::now() < end {
            let client = store.current(&id("web")).unwrap();
            let server = store.current(&id("cart")).unwrap();
            exchange(&client, &server).await.unwrap();
            serials.insert(client.serial.clone());
            done.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        serials.len()
    };
    let serials = handshakes.await;
    assert!(serials >= 3, "{serials} certificates in 8 s");
    assert!(done.load(Ordering::Relaxed) > 50);
    stop.cancel();
}

#[tokio::test]
async fn without_a_ca_a_short_certificate_expires_and_is_back_after_the_ca_is() {
    let ca = Running::start(Duration::from_secs(2)).await;
    let (store, stop) = ca.store();
    store.want([id("web")].into());
    let held = store.ready(&id("web"), SOON).await.unwrap();
    let address = ca.address;
    let directory = ca.end().await;
    until(async || store.current(&id("web")).is_err()).await;
    assert!(SystemTime::now() >= held.not_after);
    let status = store.status();
    assert_eq!(status[0].state, CertificateState::Expired);
    let error = status[0].last_error.as_deref().unwrap();
    assert!(error.contains("cannot connect"), "{error}");

    let options = AuthorityOptions {
        listen: address,
        state_dir: directory.path().join("state"),
        trust_domain: TrustDomain::default(),
        authenticator_file: directory.path().join("nodes.yaml"),
        certificate_lifetime: Duration::from_secs(2),
        server_names: vec![],
    };
    let again = tokio::spawn(serve(options, stop.clone()));
    until(async || store.current(&id("web")).is_ok()).await;
    stop.cancel();
    again.await.unwrap().unwrap();
}

/// A handshake over loopback, both identities checked, and a byte each way.
async fn exchange(
    client: &WorkloadCertificate,
    server: &WorkloadCertificate,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let connect = async {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::from(address.ip());
        let connector = TlsConnector::from(client.client.clone());
        let mut stream = connector.connect(name, stream).await?;
        let peer = peer_identity(stream.get_ref().1.peer_certificates().unwrap_or_default())?;
        anyhow::ensure!(peer == server.id);
        stream.write_all(b"?").await?;
        anyhow::ensure!(stream.read_u8().await? == b'!');
        Ok(())
    };
    let accept = async {
        let (stream, _) = listener.accept().await?;
        let acceptor = TlsAcceptor::from(server.server.clone());
        let mut stream = acceptor.accept(stream).await?;
        let peer = peer_identity(stream.get_ref().1.peer_certificates().unwrap_or_default())?;
        anyhow::ensure!(peer == client.id);
        stream.read_u8().await?;
        stream.write_all(b"!").await?;
        Ok(())
    };
    tokio::try_join!(connect, accept)?;
    Ok(())
}

/// Waits for a condition, with a deadline.
async fn until(condition: impl AsyncFn() -> bool) {
    let end = tokio::time::Instant::now() + SOON;
    while !condition().await {
        assert!(tokio::time::Instant::now() < end, "it never came true");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn the_own_certificate_names_what_was_given_the_address_and_localhost() {
    let options = AuthorityOptions {
        listen: "192.0.2.1:15012".parse().unwrap(),
        state_dir: Path::new("/s").into(),
        trust_domain: TrustDomain::default(),
        authenticator_file: Path::new("/a").into(),
        certificate_lifetime: OWN_LIFETIME,
        server_names: vec!["ca.undermesh".to_owned(), "localhost".to_owned()],
    };
    assert_eq!(
        own_names(&options),
        ["192.0.2.1", "ca.undermesh", "localhost"]
    );
    let options = AuthorityOptions {
        listen: "0.0.0.0:15012".parse().unwrap(),
        ..options
    };
    assert_eq!(own_names(&options), ["ca.undermesh", "localhost"]);
}
