//! Reading more from the socket at a time than TLS asks for.
//!
//! rustls reads into a buffer of its own that grows by 4 KiB at a time and holds one record, so a bulk
//! stream costs it a system call for each record or more. Here one takes what has come, and TLS is fed from
//! it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, ReadBuf};
use tokio_util::io::poll_read_buf;

/// One read: seven full records and a part of the next. It stays in the processor's cache.
const AHEAD_BYTES: usize = 128 * 1024;

/// Free buffers that are kept (4 MiB); more are freed when given back.
const IDLE_BUFFERS: usize = 32;

static IDLE: Mutex<Vec<BytesMut>> = Mutex::new(Vec::new());

/// What was read from one socket and not asked for yet. An idle tunnel holds no buffer.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    buffer: BytesMut,
    /// How much of it was given on.
    taken: usize,
}

impl ReadAhead {
    /// As [`AsyncRead::poll_read`] of `source`. Whether the socket was asked is in the answer: `false`
    /// for bytes that had come before.
    pub fn poll_read<R: AsyncRead + Unpin>(
        &mut self,
        source: &mut R,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<bool>> {
        let fresh = self.taken == self.buffer.len();
        if fresh {
            self.rent();
            match poll_read_buf(Pin::new(source), cx, &mut self.buffer) {
                Poll::Ready(Ok(read)) if read > 0 => {}
                // Nothing yet, the end, or an error.
                other => {
                    self.give_back();
                    ready!(other)?;
                    return Poll::Ready(Ok(false));
                }
            }
        }
        let rest = &self.buffer[self.taken..];
        let length = rest.len().min(into.remaining());
        into.put_slice(&rest[..length]);
        self.taken += length;
        if self.taken == self.buffer.len() {
            self.give_back();
        }
        Poll::Ready(Ok(fresh))
    }

    fn rent(&mut self) {
        if self.buffer.capacity() == 0 {
            let idle = IDLE.lock().pop();
            self.buffer = idle.unwrap_or_else(|| BytesMut::with_capacity(AHEAD_BYTES));
        }
    }

    fn give_back(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.taken = 0;
        buffer.clear();
        let mut idle = IDLE.lock();
        if idle.len() < IDLE_BUFFERS {
            idle.push(buffer);
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        if self.buffer.capacity() > 0 {
            self.give_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    async fn read(
        ahead: &mut ReadAhead,
        source: &mut (impl AsyncRead + Unpin),
        most: usize,
    ) -> (Vec<u8>, bool) {
        let mut bytes = vec![0; most];
        let mut into = ReadBuf::new(&mut bytes);
        let asked = poll_fn(|cx| ahead.poll_read(source, cx, &mut into))
            .await
            .unwrap();
        let length = into.filled().len();
        bytes.truncate(length);
        (bytes, asked)
    }

    #[tokio::test]
    async fn what_came_at_once_is_read_at_once_and_given_on_in_pieces() {
        let (mut far, mut near) = duplex(64);
        let mut ahead = ReadAhead::default();
        far.write_all(b"one two three").await.unwrap();
        assert_eq!(
            read(&mut ahead, &mut near, 4).await,
            (b"one ".to_vec(), true)
        );
        assert_eq!(
            read(&mut ahead, &mut near, 4).await,
            (b"two ".to_vec(), false)
        );
        assert_eq!(
            read(&mut ahead, &mut near, 9).await,
            (b"three".to_vec(), false)
        );
        assert_eq!(ahead.buffer.capacity(), 0, "an idle tunnel holds no buffer");
        far.write_all(b"four").await.unwrap();
        assert_eq!(
            read(&mut ahead, &mut near, 9).await,
            (b"four".to_vec(), true)
        );
    }

    #[tokio::test]
    async fn the_end_comes_after_what_was_read_ahead() {
        let (mut far, mut near) = duplex(64);
        let mut ahead = ReadAhead::default();
        far.write_all(b"last").await.unwrap();
        drop(far);
        assert_eq!(read(&mut ahead, &mut near, 3).await.0, b"las");
        assert_eq!(read(&mut ahead, &mut near, 3).await.0, b"t");
        assert_eq!(read(&mut ahead, &mut near, 3).await, (Vec::new(), false));
        assert_eq!(ahead.buffer.capacity(), 0);
    }

    #[tokio::test]
    async fn nothing_is_held_while_there_is_nothing_to_read() {
        let (_far, mut near) = duplex(64);
        let mut ahead = ReadAhead::default();
        let mut bytes = [0; 8];
        let mut into = ReadBuf::new(&mut bytes);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(ahead.poll_read(&mut near, &mut cx, &mut into).is_pending());
        assert_eq!(ahead.buffer.capacity(), 0);
    }
}
