//! The successor's side.

use std::collections::HashMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use super::channel::{Channel, is_busy, is_nobody};
use super::{ANSWER, Endpoint, Entry, HandoverError, LIMIT, Reply, Request, VERSION, slot};
use crate::capture::Handed;

/// A running agent.
pub struct Predecessor {
    channel: Channel,
    path: PathBuf,
}

/// What was taken over; the running agent accepts at the same sockets.
pub struct Taken {
    channel: Channel,
    path: PathBuf,
    /// The pods' listeners.
    pub listeners: Vec<Handed>,
    /// The agent's own.
    pub own: HashMap<Endpoint, TcpListener>,
}

impl Predecessor {
    /// Greets the agent at `path`; [`HandoverError::Nobody`] if there is none, and
    /// [`HandoverError::Late`] if there is one that does not answer.
    pub async fn greet(path: &Path, node: &str) -> Result<Self, HandoverError> {
        let connected = Channel::connect(path, ANSWER).await;
        let mut channel = connected.map_err(|source| match source {
            source if is_busy(&source) => HandoverError::Late,
            source if is_nobody(&source) => HandoverError::Nobody {
                path: path.to_owned(),
                source,
            },
            source => HandoverError::Io(source),
        })?;
        channel.check_peer()?;
        let hello = Request::Hello {
            versions: vec![VERSION],
        };
        channel.send(&hello, &[]).await?;
        match channel.receive(ANSWER).await?.0 {
            Reply::Hello { node: other, .. } if other == node => Ok(Self {
                channel,
                path: path.to_owned(),
            }),
            Reply::Hello { node: other, .. } => Err(HandoverError::Refused(format!(
                "it is the agent of {other}, not of {node}"
            ))),
            other => Err(unexpected(other)),
        }
    }

    /// Takes its listeners, without certificates for these identities: refused if it has one. If it
    /// dies meanwhile, what has come is what there is.
    pub async fn take(self, without: Vec<String>) -> Result<Taken, HandoverError> {
        let mut taken = Taken {
            channel: self.channel,
            path: self.path,
            listeners: Vec::new(),
            own: HashMap::new(),
        };
        match taken.channel.send(&Request::Take { without }, &[]).await {
            // It may have said why before it went away.
            Ok(()) | Err(HandoverError::Gone) => {}
            Err(error) => return Err(error),
        }
        loop {
            let (entries, descriptors) = match taken.channel.receive(LIMIT).await {
                Ok((Reply::Listeners(entries), descriptors)) => (entries, descriptors),
                Ok((Reply::End { total }, _)) => {
                    let found = taken.listeners.len() + taken.own.len();
                    if found != total {
                        let what = format!("{found} listeners of {total}");
                        return Err(HandoverError::Protocol(what));
                    }
                    return Ok(taken);
                }
                Ok((other, _)) => return Err(unexpected(other)),
                Err(HandoverError::Gone) => {
                    tracing::warn!("the running agent went away while it handed over");
                    return Ok(taken);
                }
                Err(error) => return Err(error),
            };
            if entries.len() != descriptors.len() {
                let (named, came) = (entries.len(), descriptors.len());
                let what = format!("{named} listeners with {came} descriptors");
                return Err(HandoverError::Protocol(what));
            }
            for (entry, descriptor) in entries.into_iter().zip(descriptors) {
                match entry {
                    Entry::Pod {
                        netns_cookie,
                        family,
                        kind,
                    } => taken.listeners.push(Handed {
                        slot: slot(netns_cookie, family, kind),
                        descriptor,
                    }),
                    Entry::Own(endpoint) => {
                        taken.own.insert(endpoint, descriptor.into());
                    }
                }
            }
        }
    }
}

impl Taken {
    /// Tells the running agent that this one accepts for every pod. On return this one is alone,
    /// or the other goes on and the error says why.
    pub async fn accepting(mut self) -> Result<(), HandoverError> {
        let sent = self.channel.send(&Request::Accepting, &[]).await;
        let answer = match sent {
            // It may have said why before it went away.
            Ok(()) | Err(HandoverError::Gone) => self.channel.receive::<Reply>(LIMIT).await,
            Err(error) => return Err(error),
        };
        match answer {
            Ok((Reply::Released, _)) => Ok(()),
            Ok((other, _)) => Err(unexpected(other)),
            Err(HandoverError::Gone) if self.is_nobody_there().await => {
                tracing::warn!("the running agent died; what it had accepted is reset");
                Ok(())
            }
            // It read the message, or it hangs: in either case this agent accepts, and the
            // other's connections are its own business.
            Err(HandoverError::Late) => {
                tracing::warn!("the old agent does not say that it has let go");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn is_nobody_there(&self) -> bool {
        matches!(Channel::try_connect(&self.path).await, Err(error) if is_nobody(&error))
    }
}

fn unexpected(reply: Reply) -> HandoverError {
    match reply {
        Reply::Refused { reason } => HandoverError::Refused(reason),
        other => HandoverError::Protocol(format!("{other:?}")),
    }
}
