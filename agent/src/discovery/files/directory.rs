//! A directory of manifests and what came of each file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;

use super::Limits;
use super::document::{Bad, Document, parse};
use super::read::{Content, Signature, list, read};
use super::status::{DocumentError, ERRORS_LISTED, FileStatus};
use super::tree::Tree;
use crate::discovery::object::{Object, ObjectKey, Rejection};
use crate::discovery::translate::PodState;
use crate::discovery::{Change, Cluster, Outcome};

/// A directory of manifests and what came of each file.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    limits: Limits,
    cluster: Cluster,
    files: BTreeMap<String, FileState>,
    /// Which file an object is from: the first that has it.
    owners: HashMap<ObjectKey, String>,
    /// What is wrong with the directory as a whole.
    error: Option<DocumentError>,
}

/// What came of a file.
#[derive(Debug, Default)]
struct FileState {
    /// None if it is to be read again.
    signature: Option<Signature>,
    /// Objects that are this file's, and their lines.
    objects: BTreeMap<ObjectKey, u64>,
    /// Objects of this file that another has.
    duplicates: BTreeSet<ObjectKey>,
    errors: Vec<DocumentError>,
    ignored: BTreeMap<String, usize>,
    /// Lines of the fields for which objects were refused.
    refused_at: BTreeMap<ObjectKey, (String, u64)>,
}

/// What to do after a look at the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait for the next change.
    Wait,
    /// A file changed while it was read: look again soon.
    LookAgain,
}

/// Objects of a file as it is now, before it is known which it may have.
#[derive(Debug, Default)]
struct Reading {
    objects: Vec<(ObjectKey, Object, Tree)>,
    bad: Vec<Bad>,
    ignored: BTreeMap<String, usize>,
}

/// Objects of one look, on their way to the cluster.
#[derive(Debug, Default)]
struct Batch {
    puts: Vec<(ObjectKey, Object, Tree)>,
    released: BTreeSet<ObjectKey>,
    /// Objects in force of which the new version cannot be read.
    refusals: Vec<Rejection>,
}

impl Batch {
    /// As it nearly always is.
    fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.released.is_empty() && self.refusals.is_empty()
    }
}

impl Directory {
    pub(super) fn new(path: PathBuf, node: &str, limits: Limits) -> Self {
        Self {
            path,
            limits,
            cluster: Cluster::new(node),
            files: BTreeMap::new(),
            owners: HashMap::new(),
            error: None,
        }
    }

    pub(super) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Looks at all files, reads those that changed or that are said to have, and leaves those
    /// alone that somebody is writing.
    pub(super) fn look(
        &mut self,
        touched: &BTreeSet<String>,
        busy: &BTreeSet<String>,
    ) -> (Outcome, Next) {
        let listed = match list(&self.path, self.limits.files) {
            Ok((listed, 0)) => {
                self.error = None;
                listed
            }
            Ok((listed, beyond)) => {
                let reason = format!(
                    "has {} files, more than {}: those after {} are not read",
                    listed.len() + beyond,
                    self.limits.files,
                    listed
                        .last_key_value()
                        .map_or("", |(name, _)| name.as_str()),
                );
                self.error = Some(DocumentError::of_file("", reason));
                listed
            }
            // A directory that is gone for a moment takes nothing with it.
            Err(error) => {
                let reason = format!("cannot be read: {error}");
                self.error = Some(DocumentError::of_file("", reason));
                return (Outcome::Unchanged, Next::Wait);
            }
        };
        let mut batch = Batch::default();
        let gone: Vec<String> = self
            .files
            .keys()
            .filter(|name| !listed.contains_key(*name) && !busy.contains(*name))
            .cloned()
            .collect();
        for name in gone {
            self.forget(&name, &mut batch);
        }
        let changed = listed
            .iter()
            .filter(|(name, signature)| {
                let known = self.files.get(*name).and_then(|state| state.signature);
                !busy.contains(*name) && (known != Some(**signature) || touched.contains(*name))
            })
            .map(|(name, _)| name.clone())
            .collect();
        let next = self.take(changed, &mut batch);
        if batch.is_empty() {
            return (Outcome::Unchanged, next);
        }
        // Files that had an object twice may have it now that it is free.
        let heirs: Vec<String> = self
            .files
            .iter()
            .filter(|(_, state)| !state.duplicates.is_disjoint(&batch.released))
            .map(|(name, _)| name.clone())
            .collect();
        let later = self.take(heirs, &mut batch);
        let outcome = self.apply(batch);
        let again = next == Next::LookAgain || later == Next::LookAgain;
        (outcome, if again { Next::LookAgain } else { Next::Wait })
    }

    fn forget(&mut self, name: &str, batch: &mut Batch) {
        let Some(state) = self.files.remove(name) else {
            return;
        };
        for key in state.objects.into_keys() {
            self.owners.remove(&key);
            batch.released.insert(key);
        }
    }

    /// Reads these files. All of them give up what they no longer have before one of them takes
    /// something: an object may move from file to file.
    fn take(&mut self, names: Vec<String>, batch: &mut Batch) -> Next {
        let mut next = Next::Wait;
        let mut readings = Vec::new();
        for name in names {
            match read(&self.path.join(&name), self.limits.file_bytes) {
                Content::Text(signature, text) => {
                    let reading = Reading::of(&text);
                    self.give_up(&name, &reading, batch);
                    readings.push((name, signature, reading));
                }
                Content::Unsettled => next = Next::LookAgain,
                Content::Gone => {}
                Content::Refused(reason) => {
                    let state = self.files.entry(name.clone()).or_default();
                    state.signature = None;
                    state.errors = vec![DocumentError::of_file(&name, reason)];
                }
            }
        }
        for (name, signature, reading) in readings {
            self.take_reading(&name, signature, reading, batch);
        }
        next
    }

    fn give_up(&mut self, name: &str, reading: &Reading, batch: &mut Batch) {
        let Some(state) = self.files.get_mut(name) else {
            return;
        };
        // Who knows which objects are in a document that does not tell its name.
        if reading.bad.iter().any(|bad| bad.key.is_none()) {
            return;
        }
        let still: BTreeSet<&ObjectKey> = reading
            .objects
            .iter()
            .map(|(key, ..)| key)
            .chain(reading.bad.iter().filter_map(|bad| bad.key.as_ref()))
            .collect();
        let owners = &mut self.owners;
        state.objects.retain(|key, _| {
            let keep = still.contains(key);
            if !keep {
                owners.remove(key);
                batch.released.insert(key.clone());
            }
            keep
        });
    }

    fn take_reading(
        &mut self,
        name: &str,
        signature: Signature,
        reading: Reading,
        batch: &mut Batch,
    ) {
        let mut state = self.files.remove(name).unwrap_or_default();
        state.signature = Some(signature);
        state.ignored = reading.ignored;
        state.duplicates.clear();
        state.refused_at.clear();
        for bad in &reading.bad {
            let rejection = bad.rejection().filter(|rejection| {
                let owner = self.owners.get(&rejection.object);
                rejection.object.route().is_some() && owner.is_some_and(|owner| owner == name)
            });
            if let Some(rejection) = rejection {
                let place = (rejection.field.clone(), bad.line);
                state.refused_at.insert(rejection.object.clone(), place);
                batch.refusals.push(rejection);
            }
        }
        state.errors = reading.bad.into_iter().map(|bad| bad.at(name)).collect();
        let mut seen: BTreeMap<ObjectKey, u64> = BTreeMap::new();
        for (key, object, tree) in reading.objects {
            let line = tree.line;
            let refuse = |reason: String| DocumentError {
                line: Some(line),
                object: Some(key.clone()),
                ..DocumentError::of_file(name, reason)
            };
            if let Some(first) = seen.get(&key) {
                state
                    .errors
                    .push(refuse(format!("is in line {first} already")));
                continue;
            }
            match self.owners.get(&key) {
                Some(owner) if owner != name => {
                    state.errors.push(refuse(format!("is in {owner} already")));
                    state.duplicates.insert(key);
                    continue;
                }
                Some(_) => {}
                None if self.owners.len() >= self.limits.objects => {
                    let bound = self.limits.objects;
                    state
                        .errors
                        .push(refuse(format!("there are {bound} objects already")));
                    // To be tried again once another goes.
                    state.signature = None;
                    continue;
                }
                None => {
                    self.owners.insert(key.clone(), name.to_owned());
                }
            }
            seen.insert(key.clone(), line);
            state.objects.insert(key.clone(), line);
            batch.puts.push((key, object, tree));
        }
        self.files.insert(name.to_owned(), state);
    }

    fn apply(&mut self, batch: Batch) -> Outcome {
        let gone = batch
            .released
            .into_iter()
            .filter(|key| !self.owners.contains_key(key))
            .map(Change::Delete);
        let mut trees = Vec::with_capacity(batch.puts.len());
        let mut changes: Vec<Change> = gone.collect();
        changes.extend(batch.refusals.into_iter().map(Change::Refuse));
        for (key, object, tree) in batch.puts {
            changes.push(Change::Put(object));
            trees.push((key, tree));
        }
        let outcome = self.cluster.apply(changes);
        for (key, tree) in trees {
            let Some(rejection) = self.cluster.rejection(&key) else {
                continue;
            };
            let line = tree.line_of(&rejection.field);
            let owner = self.owners.get(&key);
            if let Some(state) = owner.and_then(|owner| self.files.get_mut(owner)) {
                let place = (rejection.field.clone(), line);
                state.refused_at.insert(key, place);
            }
        }
        outcome
    }

    /// The state of all that, but for what only the source knows.
    pub(super) fn status(&self) -> FileStatus {
        let errors = self.errors();
        let mut ignored = BTreeMap::new();
        for (kind, count) in self.files.values().flat_map(|state| &state.ignored) {
            *ignored.entry(kind.clone()).or_insert(0) += count;
        }
        FileStatus {
            directory: self.path.clone(),
            files: self.files.len(),
            objects: self.cluster.counts(),
            pods_pending: self.cluster.pods_in(PodState::Pending),
            pods_finished: self.cluster.pods_in(PodState::Finished),
            ignored,
            errors_total: errors.len(),
            errors: errors.into_iter().take(ERRORS_LISTED).collect(),
            ..FileStatus::default()
        }
    }

    fn errors(&self) -> BTreeSet<DocumentError> {
        let of_documents = self
            .files
            .values()
            .flat_map(|state| state.errors.iter().cloned());
        let of_objects = self.cluster.rejections().filter_map(|rejection| {
            let key = &rejection.object;
            let file = self.owners.get(key)?;
            let state = self.files.get(file)?;
            let line = match state.refused_at.get(key) {
                Some((field, line)) if *field == rejection.field => Some(*line),
                _ => state.objects.get(key).copied(),
            };
            Some(DocumentError {
                line,
                object: Some(key.clone()),
                field: Some(rejection.field.clone()),
                ..DocumentError::of_file(file, rejection.reason.clone())
            })
        });
        of_documents
            .chain(of_objects)
            .chain(self.error.clone())
            .collect()
    }
}

impl Reading {
    fn of(text: &str) -> Self {
        let mut reading = Self::default();
        for document in parse(text) {
            match document {
                Document::Object(object, tree) => {
                    reading.objects.push((object.key(), *object, tree));
                }
                Document::Ignored(kind) => *reading.ignored.entry(kind).or_insert(0) += 1,
                Document::Bad(bad) => reading.bad.push(bad),
            }
        }
        reading
    }
}

impl Bad {
    /// Why the object's new version is not in force, if it is known which object it is.
    fn rejection(&self) -> Option<Rejection> {
        Some(Rejection {
            object: self.key.clone()?,
            field: self.field.clone()?,
            reason: self.reason.clone(),
        })
    }

    fn at(self, file: &str) -> DocumentError {
        DocumentError {
            file: file.to_owned(),
            line: Some(self.line),
            column: self.column,
            object: self.key,
            field: self.field,
            reason: self.reason,
        }
    }
}
