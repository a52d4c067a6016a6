//! Where log lines go: standard output, through a bounded queue and a thread of its own, so that an
//! output that stalls does not stall connections.

use std::env::{self, VarError};
use std::io::{self, IsTerminal};

use clap::ValueEnum;
use thiserror::Error;
use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

use super::line::AccessLines;
use super::log_queue::{LogQueue, LogThread};
use super::{Labelled, Telemetry};

/// What is logged when `RUST_LOG` does not say.
const DEFAULT_FILTER: &str = "info";

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// For people: `name="value"`, quoted and escaped.
    #[default]
    Text,
    /// One JSON object for each line.
    Json,
}

/// Why nothing can be logged.
#[derive(Debug, Error)]
pub enum LoggingError {
    /// `RUST_LOG` is not a filter.
    #[error("RUST_LOG is not a log filter")]
    Filter(#[from] ParseError),
    /// `RUST_LOG` is not UTF-8.
    #[error("RUST_LOG is not text")]
    FilterText(#[source] VarError),
    /// Something in this process logs already.
    #[error("logging was set up before")]
    Twice(#[from] TryInitError),
    /// There is no thread to write with.
    #[error("cannot start the thread that writes the log")]
    Thread(#[from] io::Error),
}

/// Logging as it was set up. What waits is written when this is dropped: keep it until the end.
pub struct Logging {
    _thread: LogThread,
    queue: LogQueue,
}

impl Logging {
    /// Logs to standard output from now on, filtered as `RUST_LOG` says (default `info`).
    pub fn init(format: LogFormat) -> Result<Self, LoggingError> {
        let filter = match env::var(EnvFilter::DEFAULT_ENV) {
            Ok(filter) => EnvFilter::try_new(filter)?,
            Err(VarError::NotPresent) => EnvFilter::try_new(DEFAULT_FILTER)?,
            Err(error @ VarError::NotUnicode(_)) => return Err(LoggingError::FilterText(error)),
        };
        let (queue, thread) = LogQueue::start(io::stdout())?;
        let colours = io::stdout().is_terminal();
        subscriber(format, filter, queue.clone(), colours).try_init()?;
        Ok(Self {
            _thread: thread,
            queue,
        })
    }

    /// Shows in the metrics how many lines were dropped.
    pub fn report(&self, telemetry: &Telemetry) {
        let queue = self.queue.clone();
        telemetry.register_counter(
            "undermesh_log_lines_dropped",
            "Log lines that were dropped because the output did not take them",
            move || vec![Labelled::bare(queue.dropped())],
        );
    }
}

pub(super) fn subscriber<W>(
    format: LogFormat,
    filter: EnvFilter,
    writer: W,
    colours: bool,
) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer);
    match format {
        LogFormat::Text => Box::new(
            builder
                .with_ansi(colours)
                .map_event_format(|others| AccessLines::new(others, format))
                .finish(),
        ),
        LogFormat::Json => Box::new(
            builder
                .json()
                .flatten_event(true)
                .with_current_span(false)
                .with_span_list(false)
                .map_event_format(|others| AccessLines::new(others, format))
                .finish(),
        ),
    }
}
