//! Attacks on the agent's ports: taking them, joining them, talking to them.

use anyhow::Result;

use super::field::{ECHO, EVENTS, FAILED, Field, HBONE, MARK, SETTLE, VERDICTS};
use super::intruder::AttackReport;
use super::trial::AttackResult;
use crate::figures::Witness;
use crate::process::Process;
use crate::tls::{handshake, is_session};

/// openssl takes long to start.
const HANDSHAKES: u64 = 3;
/// So long a session is watched that nobody ends: a refusal takes milliseconds.
const WATCHED_SECONDS: u32 = 1;

impl Field<'_> {
    /// The outsider's own listeners allow what the agent's must not.
    pub fn join(&self) -> Result<AttackResult> {
        let listening = self.listen("outsider", self.far)?;
        let join = |pod: &str| self.attack(pod, "join", self.far, &[]);
        let control = || Ok(join("outsider")?.succeeded);
        let mut result = self.judged(
            "join_listener",
            (VERDICTS, ("verdict", "connect_captured")),
            || join("intruder"),
            control,
        )?;
        // bind(2) itself is refused: there is nothing to count.
        result.metric.clear();
        result.metric_delta = 0;
        drop(listening);
        Ok(result)
    }

    pub fn knock(&self) -> Result<AttackResult> {
        let listening = self.listen("outsider", self.far)?;
        let more = ["--mark".to_owned(), MARK.to_string()];
        let knock = |pod: &str| self.attack(pod, "knock", self.far, &more);
        let metric = (EVENTS, ("event", "role_mismatch"));
        let control = || Ok(knock("outsider")?.succeeded);
        let result = self.judged("agents_listeners", metric, || knock("intruder"), control)?;
        drop(listening);
        Ok(result)
    }

    /// What is for the agent of a pod where somebody else listens on everything.
    pub fn steal(&self, id: &str, mut thief: Process, pod: &str) -> Result<AttackResult> {
        let control = || {
            let mut thief = self.listen("outsider", self.far)?;
            let more = ["--mark".to_owned(), MARK.to_string()];
            self.attack("outsider", "pose", self.far, &more)
                .map(|report| {
                    let _ = thief.signal(nix::sys::signal::Signal::SIGKILL);
                    let _ = thief.wait(SETTLE);
                    report.succeeded
                })
        };
        let attack = || {
            // Right answers come from the server only; the thief's line is the same, so it is told apart
            // by what the server counted.
            let witness = Witness::start(self.lab)?;
            let made = self.attack(pod, "speak", self.far, &[])?;
            let seen = witness.until("connections", |seen| seen.outbound >= made.attempts)?;
            let tunnels = self.attack("outsider", "tunnel", self.lab.pod(pod)?.v4(HBONE), &[])?;
            Ok(AttackReport {
                attempts: made.attempts + tunnels.attempts,
                succeeded: made.attempts.saturating_sub(seen.outbound) + tunnels.succeeded,
                met: tunnels.met,
            })
        };
        let metric = (VERDICTS, ("verdict", "lookup_outbound"));
        let result = self.judged(id, metric, attack, control);
        thief.signal(nix::sys::signal::Signal::SIGKILL)?;
        thief.wait(SETTLE)?;
        result
    }

    pub fn plaintext(&self) -> Result<AttackResult> {
        let speak = |to: &str| self.attack("outsider", "speak", self.lab.pod(to)?.v4(ECHO), &[]);
        let metric = (FAILED, ("reason", "plaintext_refused"));
        let control = || Ok(speak("plain")?.succeeded);
        self.judged("plaintext_to_strict", metric, || speak("victim"), control)
    }

    pub fn tunnel(&self, id: &str, from: &str, to: &str) -> Result<AttackResult> {
        let tunnel =
            |from: &str, to: &str| self.attack(from, "tunnel", self.lab.pod(to)?.v4(HBONE), &[]);
        let metric = match (from, to) {
            ("outsider", _) => (VERDICTS, ("verdict", "lookup_hbone")),
            (from, to) if from == to => (VERDICTS, ("verdict", "connect_own_address")),
            _ => (VERDICTS, ("verdict", "connect_captured")),
        };
        let listening = self.listen("plain", self.lab.pod("plain")?.v4(80))?;
        let control = || Ok(tunnel("outsider", "plain")?.succeeded);
        let result = self.judged(id, metric, || tunnel(from, to), control);
        drop(listening);
        result
    }

    /// Real TLS to another pod, with no certificate or with one that the mesh's CA never saw. The control shows
    /// the CA's own.
    pub fn tls_to_others(&self, id: &str, certificate: Option<&str>) -> Result<AttackResult> {
        let metric = (FAILED, ("reason", "tls"));
        let attack = |certificate| self.handshakes("outsider", "victim", certificate);
        let control = || Ok(attack(Some("true"))?.succeeded);
        self.judged(id, metric, || attack(certificate), control)
    }

    /// The same from within the mesh, even with a good certificate that was stolen. The control meets a server
    /// where there is no mesh.
    pub fn tls_from_pod(&self, id: &str, to: &str) -> Result<AttackResult> {
        let verdict = if to == "intruder" {
            "connect_own_address"
        } else {
            "connect_captured"
        };
        let control = || {
            let plain = self.lab.pod("plain")?;
            let port = HBONE.to_string();
            let certificate = self.certificate("true")?.display().to_string();
            let key = certificate.replace(".pem", ".key");
            let words = ["s_server", "-accept", &port, "-alpn", "h2", "-quiet"];
            let words = [&words[..], &["-cert", &certificate, "-key", &key]].concat();
            let mut server = plain.spawn("s_server", "openssl", &words)?;
            server.until("openssl to listen", SETTLE, |_| {
                let said = handshake(&plain, plain.v4(HBONE), None, WATCHED_SECONDS)?;
                Ok(is_session(&said))
            })?;
            Ok(self
                .handshakes("stranger", "plain", Some("true"))?
                .succeeded)
        };
        let attack = || self.handshakes("intruder", to, Some("true"));
        self.judged(id, (VERDICTS, ("verdict", verdict)), attack, control)
    }

    fn handshakes(&self, from: &str, to: &str, certificate: Option<&str>) -> Result<AttackReport> {
        let (from, to) = (self.lab.pod(from)?, self.lab.pod(to)?.v4(HBONE));
        let certificate = certificate.map(|name| self.certificate(name)).transpose()?;
        let mut report = AttackReport::default();
        for _ in 0..HANDSHAKES {
            let said = handshake(&from, to, certificate.as_deref(), WATCHED_SECONDS)?;
            report.attempts += 1;
            report.succeeded += u64::from(is_session(&said));
            if let Some(reason) = reason(&said) {
                reason.clone_into(&mut report.met);
            }
        }
        Ok(report)
    }

    fn certificate(&self, name: &str) -> Result<std::path::PathBuf> {
        let dir = self.lab.pod("outsider")?.place().dir;
        Ok(dir.join(format!("{name}.pem")))
    }
}

/// What openssl calls it: an alert, or an error of the connection.
fn reason(said: &str) -> Option<&str> {
    let mut parts = said.lines().flat_map(|line| line.split(':'));
    let telling = |part: &&str| part.contains(" alert ") || part.contains("errno=");
    parts.find(telling).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_alert_or_the_errno() {
        let alert = "verify error:num=20:unable\n40C7:error:0A00045C:SSL routines:ssl3_read_bytes:\
                     tlsv13 alert certificate required:../ssl/record/rec_layer_s3.c:1600:SSL alert number 116\n";
        assert_eq!(reason(alert), Some("tlsv13 alert certificate required"));
        assert_eq!(reason("write:errno=104\n"), Some("errno=104"));
        assert_eq!(reason("ALPN protocol: h2\n"), None);
    }
}
