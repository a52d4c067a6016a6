//! TLS by openssl: certificates of one's own making, and what a server says to them.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::lab::PodHandle;

/// Who vouches for a certificate.
#[derive(Debug, Clone, Copy)]
pub enum Issuer<'a> {
    /// Nobody: it is its own root.
    Itself,
    /// Who has this certificate and this key.
    Authority(&'a Path, &'a Path),
}

/// Makes `<name>.pem` and `<name>.key` in `dir`, for a SPIFFE id.
pub fn certificate(dir: &Path, name: &str, uri: &str, issuer: Issuer<'_>) -> Result<()> {
    let file = |extension: &str| dir.join(format!("{name}.{extension}"));
    let mut command = std::process::Command::new("openssl");
    command
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ])
        .args([
            "-days",
            "1",
            "-subj",
            "/O=test",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
        ])
        .args(["-addext", &format!("subjectAltName=critical,URI:{uri}")])
        .args(["-addext", "extendedKeyUsage=clientAuth,serverAuth"])
        .arg("-keyout")
        .arg(file("key"))
        .arg("-out")
        .arg(file("pem"));
    if let Issuer::Authority(root, key) = issuer {
        command.arg("-CA").arg(root).arg("-CAkey").arg(key);
    }
    let output = command.output().context("openssl")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "openssl req: {said}");
    Ok(())
}

/// What openssl says of a TLS connection from a pod to a port that speaks HTTP/2, kept open for so many seconds
/// if nobody ends it. `certificate` names the file whose key is beside it.
pub fn handshake(
    from: &PodHandle,
    to: std::net::SocketAddr,
    certificate: Option<&Path>,
    seconds: u32,
) -> Result<String> {
    let (address, seconds) = (to.to_string(), seconds.to_string());
    let mut words = vec![
        &seconds, "openssl", "s_client", "-connect", &address, "-alpn", "h2", "-ign_eof",
    ];
    let files = certificate.map(|file| {
        let key = file.with_extension("key");
        (file.display().to_string(), key.display().to_string())
    });
    if let Some((file, key)) = &files {
        words.extend(["-cert", file, "-key", key]);
    }
    let output = from.place().output("timeout", &words)?;
    Ok([output.stdout, output.stderr]
        .map(|text| String::from_utf8_lossy(&text).into_owned())
        .concat())
}

/// Whether what [`handshake`] gave back is a session: with TLS 1.3 the client learns of a refusal only after its
/// own part is done.
#[must_use]
pub fn is_session(said: &str) -> bool {
    said.contains("ALPN protocol: h2") && !said.contains("alert")
}
