//! The maps as the agent uses them: bounded, named in every error, shared between threads.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};

use aya::Pod;
use aya::maps::{
    HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues, SockHash,
};
use aya::util::nr_cpus;
use parking_lot::{Mutex, RwLock};
use undermesh_common::{
    Address, Admission, DestinationClass, ListenerKey, NativeKey, NativeTraffic, Note, Target,
    Tuple, Verdict, bounds,
};

use super::{KernelError, object::Loaded, probes::Probes};
use crate::capture::sys;

/// A hash map of the kernel.
pub(super) struct Table<K: Pod, V: Pod> {
    name: &'static str,
    bound: u32,
    map: RwLock<HashMap<MapData, K, V>>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    fn new(loaded: &mut Loaded, name: &'static str, bound: u32) -> Result<Self, KernelError> {
        let map = HashMap::try_from(loaded.take_map(name)?)
            .map_err(|source| KernelError::Map { map: name, source })?;
        Ok(Self {
            name,
            bound,
            map: RwLock::new(map),
        })
    }

    /// Adds or replaces an entry. [`KernelError::Full`] at the bound.
    pub(super) fn put(&self, key: &K, value: &V) -> Result<(), KernelError> {
        let result = self.map.write().insert(key, value, 0);
        result.map_err(|source| error(self.name, self.bound, source))
    }

    /// Removes an entry; that there is none is no error.
    pub(super) fn remove(&self, key: &K) -> Result<(), KernelError> {
        let result = self.map.write().remove(key);
        absent_is_fine(result, self.name, self.bound)
    }

    /// The entry, none if there is none.
    pub(super) fn get(&self, key: &K) -> Result<Option<V>, KernelError> {
        match self.map.read().get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(None),
            Err(source) => Err(error(self.name, self.bound, source)),
        }
    }

    pub(super) fn keys(&self) -> Result<Vec<K>, KernelError> {
        let map = self.map.read();
        let keys: Result<_, _> = map.keys().collect();
        keys.map_err(|source| error(self.name, self.bound, source))
    }

    pub(super) fn entries(&self) -> Result<Vec<(K, V)>, KernelError> {
        let map = self.map.read();
        let entries: Result<_, _> = map.iter().collect();
        entries.map_err(|source| error(self.name, self.bound, source))
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    pub(super) fn bound(&self) -> u32 {
        self.bound
    }
}

/// The agent's listeners.
pub(super) struct Listeners {
    map: Mutex<SockHash<MapData, ListenerKey>>,
}

impl Listeners {
    const NAME: &'static str = "LISTENERS";

    pub(super) fn put(&self, key: ListenerKey, socket: BorrowedFd<'_>) -> Result<(), KernelError> {
        let result = self.map.lock().insert(key, socket, 0);
        result.map_err(|source| error(Self::NAME, bounds::LISTENERS, source))
    }

    pub(super) fn remove(&self, key: &ListenerKey) -> Result<(), KernelError> {
        let result = self.map.lock().remove(key);
        absent_is_fine(result, Self::NAME, bounds::LISTENERS)
    }

    pub(super) fn keys(&self) -> Result<Vec<ListenerKey>, KernelError> {
        let map = self.map.lock();
        let keys: Result<_, _> = map.keys().collect();
        keys.map_err(|source| error(Self::NAME, bounds::LISTENERS, source))
    }
}

/// What is noted on sockets. For every connection that the agent opens: no worker waits here for another.
pub(super) struct Notes {
    map: MapData,
}

impl Notes {
    const NAME: &'static str = "NOTES";

    fn new(loaded: &mut Loaded) -> Result<Self, KernelError> {
        match loaded.take_map(Self::NAME)? {
            Map::SkStorage(map) => Ok(Self { map }),
            _ => Err(KernelError::Missing(Self::NAME)),
        }
    }

    /// Notes it on the socket, in place of what was noted before. It goes with the socket.
    pub(super) fn put(&self, socket: BorrowedFd<'_>, note: Note) -> Result<(), KernelError> {
        let stored = sys::store_at_socket(self.map.fd().as_fd(), socket, note as u32);
        stored.map_err(|error| KernelError::Map {
            map: Self::NAME,
            source: error.into(),
        })
    }
}

/// Native traffic of the pods.
pub(super) struct Native {
    map: Mutex<PerCpuHashMap<MapData, NativeKey, NativeTraffic>>,
}

impl Native {
    const NAME: &'static str = "NATIVE";

    /// Begins to count for a pod; goes on where it is counted already.
    pub(super) fn watch(&self, netns_cookie: u64) -> Result<(), KernelError> {
        let cpus = nr_cpus().map_err(|(_, error)| KernelError::Map {
            map: Self::NAME,
            source: error.into(),
        })?;
        for key in Self::keys(netns_cookie) {
            let zeros =
                PerCpuValues::try_from(vec![NativeTraffic::default(); cpus]).map_err(|source| {
                    KernelError::Map {
                        map: Self::NAME,
                        source: source.into(),
                    }
                })?;
            let result = self.map.lock().insert(key, zeros, u64::from(BPF_NOEXIST));
            match result {
                Err(source) if errno(&source) == Some(libc::EEXIST) => {}
                other => other.map_err(|source| error(Self::NAME, bounds::NATIVE, source))?,
            }
        }
        Ok(())
    }

    pub(super) fn forget(&self, netns_cookie: u64) -> Result<(), KernelError> {
        for key in Self::keys(netns_cookie) {
            let result = self.map.lock().remove(&key);
            absent_is_fine(result, Self::NAME, bounds::NATIVE)?;
        }
        Ok(())
    }

    /// Over all CPUs, nothing for a pod that is not watched.
    pub(super) fn of(&self, netns_cookie: u64) -> Vec<(DestinationClass, NativeTraffic)> {
        let classes = DestinationClass::ALL.into_iter();
        classes
            .zip(Self::keys(netns_cookie))
            .filter_map(|(class, key)| {
                let values = self.map.lock().get(&key, 0).ok()?;
                let mut sum = NativeTraffic::default();
                values.iter().for_each(|value| sum.add(value));
                Some((class, sum))
            })
            .collect()
    }

    fn keys(netns_cookie: u64) -> impl Iterator<Item = NativeKey> {
        let classes = DestinationClass::ALL.into_iter();
        classes.map(move |class| NativeKey::new(netns_cookie, class as u32))
    }
}

/// `BPF_NOEXIST` of include/uapi/linux/bpf.h.
const BPF_NOEXIST: u32 = 1;

/// All maps.
pub(super) struct Maps {
    pub(super) pods: Table<u64, undermesh_common::Pod>,
    pub(super) targets: Table<Target, u32>,
    pub(super) notes: Notes,
    pub(super) admitted: Table<Tuple, Admission>,
    pub(super) listeners: Listeners,
    pub(super) native: Native,
    pub(super) node_addresses: Table<Address, u32>,
    pub(super) probes: Probes,
    verdicts: PerCpuArray<MapData, u64>,
}

impl Maps {
    pub(super) fn new(loaded: &mut Loaded) -> Result<Self, KernelError> {
        let sockets = |source| KernelError::Map {
            map: Listeners::NAME,
            source,
        };
        let native = |source| KernelError::Map {
            map: Native::NAME,
            source,
        };
        let counters = |source| KernelError::Map {
            map: "VERDICTS",
            source,
        };
        Ok(Self {
            pods: Table::new(loaded, "PODS", bounds::PODS)?,
            targets: Table::new(loaded, "TARGETS", bounds::TARGETS)?,
            notes: Notes::new(loaded)?,
            admitted: Table::new(loaded, "ADMITTED", bounds::ADMITTED)?,
            listeners: Listeners {
                map: Mutex::new(
                    SockHash::try_from(loaded.take_map(Listeners::NAME)?).map_err(sockets)?,
                ),
            },
            native: Native {
                map: Mutex::new(
                    PerCpuHashMap::try_from(loaded.take_map(Native::NAME)?).map_err(native)?,
                ),
            },
            node_addresses: Table::new(loaded, "NODE_ADDRESSES", bounds::NODE_ADDRESSES)?,
            probes: Probes::new(
                Table::new(loaded, "PROBES", bounds::PROBES)?,
                Table::new(loaded, "PROBERS", bounds::PROBERS)?,
            ),
            verdicts: PerCpuArray::try_from(loaded.take_map("VERDICTS")?).map_err(counters)?,
        })
    }

    /// Every verdict's counter, over all CPUs. A counter that cannot be read counts as 0: the map
    /// is an array of this size, so there is no such counter.
    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        Verdict::ALL
            .iter()
            .map(|verdict| {
                let index = *verdict as u32;
                let values = self.verdicts.get(&index, 0);
                let sum = values.map_or(0, |values| values.iter().sum());
                (verdict.name(), sum)
            })
            .collect()
    }
}

fn errno(source: &MapError) -> Option<i32> {
    match source {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        MapError::IoError(error) => io::Error::raw_os_error(error),
        _ => None,
    }
}

fn error(map: &'static str, bound: u32, source: MapError) -> KernelError {
    if errno(&source) == Some(libc::E2BIG) {
        KernelError::Full { map, bound }
    } else {
        KernelError::Map { map, source }
    }
}

fn absent_is_fine(
    result: Result<(), MapError>,
    map: &'static str,
    bound: u32,
) -> Result<(), KernelError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(source) if errno(&source) == Some(libc::ENOENT) => Ok(()),
        other => other.map_err(|source| error(map, bound, source)),
    }
}
