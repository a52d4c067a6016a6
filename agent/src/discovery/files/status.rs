//! What the source tells about itself.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::discovery::object::{Kind, ObjectKey};

/// How many errors a status lists; the rest is counted.
pub const ERRORS_LISTED: usize = 256;

/// State of a [`super::FileSource`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FileStatus {
    /// The directory that is read.
    pub directory: PathBuf,
    /// How changes are noticed.
    pub noticed_by: NoticedBy,
    /// Number of the snapshot in force; the first is 1.
    pub generation: u64,
    /// When that came into force (RFC 3339).
    pub last_change: String,
    /// Files that are read.
    pub files: usize,
    /// Objects in force, by kind.
    pub objects: BTreeMap<Kind, usize>,
    /// Pods that have no address yet.
    pub pods_pending: usize,
    /// Pods that ended.
    pub pods_finished: usize,
    /// Objects of kinds that are not read, by `apiVersion` and `kind`.
    pub ignored: BTreeMap<String, usize>,
    /// What is not in force, in the order of files and lines, at most [`ERRORS_LISTED`].
    pub errors: Vec<DocumentError>,
    /// How many errors there are.
    pub errors_total: usize,
}

/// How changes of files are noticed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum NoticedBy {
    /// The kernel tells, and a periodic look at all files finds what it did not tell.
    Inotify,
    /// The periodic look alone: the kernel has no watch left for us, or cannot watch this.
    #[default]
    Polling,
}

/// A file, a document or an object that is not in force. What it said before still is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct DocumentError {
    /// Name of the file in the directory; empty if it is the directory itself.
    pub file: String,
    /// Line, from 1; none if the whole file is meant.
    pub line: Option<u64>,
    /// Column, from 1, where the text is not YAML.
    pub column: Option<u64>,
    /// The object, if the document tells.
    pub object: Option<ObjectKey>,
    /// Path of the field, like `spec.ports[0].port`.
    pub field: Option<String>,
    /// What is wrong.
    pub reason: String,
}

impl DocumentError {
    pub(super) fn of_file(file: &str, reason: String) -> Self {
        Self {
            file: file.to_owned(),
            line: None,
            column: None,
            object: None,
            field: None,
            reason,
        }
    }
}

impl fmt::Display for DocumentError {
    /// `web.yaml:12: Service shop/web: spec.ports[0].port: 0 is not a port: 1 to 65535`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = if self.file.is_empty() {
            "directory"
        } else {
            &self.file
        };
        f.write_str(file)?;
        for place in [self.line, self.column].into_iter().flatten() {
            write!(f, ":{place}")?;
        }
        if let Some(object) = &self.object {
            write!(f, ": {object}")?;
        }
        if let Some(field) = self.field.as_ref().filter(|field| !field.is_empty()) {
            write!(f, ": {field}")?;
        }
        write!(f, ": {}", self.reason)
    }
}
