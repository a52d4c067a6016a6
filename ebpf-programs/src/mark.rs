//! The capture bit in a socket's mark, and the note in its storage that remembers it.

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, SO_MARK, SOL_SOCKET, bpf_sock},
    cty::{c_int, c_void},
    helpers::{bpf_getsockopt, bpf_setsockopt, bpf_sk_storage_delete, bpf_sk_storage_get},
};
use undermesh_common::{CAPTURE_MARK, Note};

use crate::maps::NOTES;

/// The kernel refused.
pub struct Refused;

/// Of a mark, and of every other option that is set here.
const SIZE: c_int = size_of::<u32>() as c_int;

/// Sets or clears the bit and leaves all others as they are. `ctx` is that of the hook.
#[inline(always)]
pub fn set_bit(ctx: *mut c_void, on: bool) -> Result<Change, Refused> {
    let mut mark = 0_u32;
    // SAFETY: the helper writes the four bytes of `mark`.
    let read = unsafe {
        bpf_getsockopt(
            ctx,
            SOL_SOCKET as c_int,
            SO_MARK as c_int,
            (&raw mut mark).cast(),
            SIZE,
        )
    };
    if read != 0 {
        return Err(Refused);
    }
    let mut wanted = if on {
        mark | CAPTURE_MARK
    } else {
        mark & !CAPTURE_MARK
    };
    if wanted == mark {
        return Ok(Change::None);
    }
    set(ctx, SOL_SOCKET, SO_MARK, &mut wanted).map(|()| Change::Written)
}

/// Sets an option of the hook's socket that is four bytes long. `ctx` is that of the hook.
#[inline(always)]
pub fn set(ctx: *mut c_void, level: u32, option: u32, value: &mut u32) -> Result<(), Refused> {
    // SAFETY: the helper reads the four bytes of `value`.
    let written = unsafe {
        bpf_setsockopt(
            ctx,
            level as c_int,
            option as c_int,
            core::ptr::from_mut(value).cast(),
            SIZE,
        )
    };
    if written == 0 { Ok(()) } else { Err(Refused) }
}

/// Whether the mark had to be written.
#[derive(PartialEq, Eq)]
pub enum Change {
    /// It was right already.
    None,
    /// It was not.
    Written,
}

/// Notes it on the socket, in place of what was noted before.
#[inline(always)]
pub fn note(sk: *mut bpf_sock, note: Note) -> Result<(), Refused> {
    if sk.is_null() {
        return Err(Refused);
    }
    let mut value = note as u32;
    // SAFETY: `sk` is the hook's own socket and not null; the helper copies the value if it makes
    // the storage.
    let stored = unsafe {
        bpf_sk_storage_get(
            (&raw const NOTES).cast_mut().cast(),
            sk.cast(),
            (&raw mut value).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    }
    .cast::<u32>();
    if stored.is_null() {
        return Err(Refused);
    }
    // SAFETY: the socket's own storage, checked not to be null; it lives as long as the socket.
    unsafe { *stored = value };
    Ok(())
}

/// What is noted on the socket.
#[inline(always)]
pub fn noted(sk: *mut bpf_sock) -> Option<Note> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: `sk` is the hook's own socket and not null; without the flag the helper only reads.
    let stored = unsafe {
        bpf_sk_storage_get(
            (&raw const NOTES).cast_mut().cast(),
            sk.cast(),
            core::ptr::null_mut(),
            0,
        )
    }
    .cast::<u32>();
    if stored.is_null() {
        return None;
    }
    // SAFETY: the socket's own storage, checked not to be null; it lives as long as the socket.
    Note::of(unsafe { *stored })
}

/// Takes the note off.
#[inline(always)]
pub fn forget(sk: *mut bpf_sock) {
    if !sk.is_null() {
        // SAFETY: `sk` is the hook's own socket and not null. That there was no note is no error.
        let _ = unsafe { bpf_sk_storage_delete((&raw const NOTES).cast_mut().cast(), sk.cast()) };
    }
}
