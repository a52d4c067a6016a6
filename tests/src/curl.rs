//! One request with curl from inside a pod, and all that came of it.

use anyhow::{Context, Result, ensure};

use crate::lab::PodHandle;
use crate::machine;
use crate::web::{REASON, SERVED_BY};

/// What curl got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// Status of the last answer; 0 if there was none.
    pub status: u16,
    /// Header fields of the last answer in their order, the names in lower case.
    pub headers: Vec<(String, String)>,
    /// Statuses of the interim answers before it.
    pub interim: Vec<u16>,
    /// Body.
    pub body: String,
    /// What curl(1) exits with: 0 is success.
    pub exit: i32,
}

impl Answer {
    /// The first field of this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut fields = self.headers.iter();
        fields
            .find(|(other, _)| other == name)
            .map(|(_, value)| value.as_str())
    }

    /// Why the mesh answered; empty if it did not.
    #[must_use]
    pub fn reason(&self) -> &str {
        self.header(REASON).unwrap_or_default()
    }

    /// Which server answered; empty if none did.
    #[must_use]
    pub fn server(&self) -> &str {
        self.header(SERVED_BY).unwrap_or_default()
    }
}

/// Asks once, with further arguments of curl; a redirect is not followed.
pub fn ask(pod: &PodHandle, url: &str, more: &[&str]) -> Result<Answer> {
    machine::require(&[machine::CURL])?;
    let mut args = vec!["--silent", "--max-time", "20", "--include"];
    args.extend(more);
    args.push(url);
    let output = pod.place().output("curl", &args)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut answer = parse(&text).with_context(|| format!("{url}: {text}"))?;
    answer.exit = output.status.code().unwrap_or(-1);
    Ok(answer)
}

/// Asks so many times, each on a connection of its own.
pub fn ask_often(pod: &PodHandle, url: &str, times: usize, more: &[&str]) -> Result<Vec<Answer>> {
    (0..times).map(|_| ask(pod, url, more)).collect()
}

fn parse(text: &str) -> Result<Answer> {
    let mut answer = Answer::default();
    let mut rest = text;
    while rest.starts_with("HTTP/") {
        let (head, behind) = rest.split_once("\r\n\r\n").context("no end of the head")?;
        rest = behind;
        let mut lines = head.lines();
        let line = lines.next().unwrap_or_default();
        if answer.status != 0 {
            answer.interim.push(answer.status);
        }
        let status = line.split(' ').nth(1).context("no status")?;
        answer.status = status.parse()?;
        answer.headers.clear();
        for line in lines {
            let (name, value) = line.split_once(':').context("no field")?;
            let field = (name.to_ascii_lowercase(), value.trim().to_owned());
            answer.headers.push(field);
        }
        let is_interim = (100..200).contains(&answer.status) && answer.status != 101;
        if !is_interim {
            break;
        }
    }
    ensure!(
        !(100..200).contains(&answer.status) || answer.status == 101,
        "no final answer"
    );
    rest.clone_into(&mut answer.body);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_what_comes_after_the_interim_ones() {
        let text = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n\
                    HTTP/1.1 404 Not Found\r\nX-Served-By: v1\r\n\r\nHTTP/1.1 no head";
        let answer = parse(text).unwrap();
        assert_eq!(answer.status, 404);
        assert_eq!(answer.interim, [103]);
        assert_eq!(answer.server(), "v1");
        assert_eq!(answer.header("link"), None);
        assert_eq!(answer.body, "HTTP/1.1 no head");
        assert_eq!(parse("").unwrap(), Answer::default());
        assert!(parse("HTTP/1.1 103 Early Hints\r\n\r\n").is_err());
    }
}
