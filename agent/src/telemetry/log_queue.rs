//! Log lines on their way to the output: gathered in memory, and written by a thread of their own,
//! many at a time. So an output that stalls does not stall connections, and a busy agent wakes the
//! thread a hundred times a second and not for every line.

use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tracing_subscriber::fmt::MakeWriter;

/// Bytes of lines that may wait to be written; lines beyond are dropped and counted.
const QUEUE_BYTES: usize = 8 * 1024 * 1024;

/// Of a buffer that grew in a burst, no more is kept than this once no line comes any more.
const KEPT_BYTES: usize = 64 * 1024;

/// A line is written at once, and those that follow it within this are written together.
const GATHER: Duration = Duration::from_millis(10);

/// How long the end of the process waits for an output that does not take the last lines.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where lines go in. Cloning gives another way into the same queue.
#[derive(Clone)]
pub(super) struct LogQueue(Arc<Shared>);

/// Dropped, it has what waits written.
pub(super) struct LogThread(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// There is something to write, or the queue ends.
    wake: Condvar,
    /// Everything was written.
    written: Condvar,
}

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    dropped: u64,
    ending: bool,
    ended: bool,
}

impl LogQueue {
    /// Starts the thread that writes to `output`.
    pub fn start(output: impl Write + Send + 'static) -> io::Result<(Self, LogThread)> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            written: Condvar::new(),
        });
        let of_thread = shared.clone();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || of_thread.write_to(output))?;
        Ok((Self(shared.clone()), LogThread(shared)))
    }

    /// How many lines were dropped because too many waited.
    pub fn dropped(&self) -> u64 {
        self.0.state.lock().dropped
    }
}

/// One call is one line, as tracing's formatter has it.
impl Write for LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut state = self.0.state.lock();
        if state.lines.len() + line.len() > QUEUE_BYTES {
            state.dropped += 1;
            return Ok(line.len());
        }
        let was_empty = state.lines.is_empty();
        state.lines.extend_from_slice(line);
        drop(state);
        if was_empty {
            self.0.wake.notify_one();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogQueue {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Shared {
    fn write_to(&self, mut output: impl Write) {
        let mut lines = Vec::new();
        let mut state = self.state.lock();
        loop {
            while state.lines.is_empty() && !state.ending {
                self.wake.wait(&mut state);
            }
            if state.lines.is_empty() {
                state.ended = true;
                self.written.notify_all();
                return;
            }
            std::mem::swap(&mut lines, &mut state.lines);
            drop(state);
            // Nobody can be told of an output that is closed.
            let _ = output.write_all(&lines).and_then(|()| output.flush());
            lines.clear();
            self.gather();
            state = self.state.lock();
            // While more lines come, they need as much room as those before.
            if state.lines.is_empty() {
                lines.shrink_to(KEPT_BYTES);
                state.lines.shrink_to(KEPT_BYTES);
            }
        }
    }

    /// Lets lines come together.
    fn gather(&self) {
        let mut state = self.state.lock();
        let until = std::time::Instant::now() + GATHER;
        while !state.ending && !self.wake.wait_until(&mut state, until).timed_out() {}
    }
}

impl Drop for LogThread {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.ending = true;
        self.0.wake.notify_one();
        let goes_on = |state: &mut State| !state.ended;
        self.0.written.wait_while_for(&mut state, goes_on, PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Tells what is written to it, once it is allowed to.
    struct Output {
        told: Sender<Vec<u8>>,
        allowed: Option<Receiver<()>>,
    }

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if let Some(allowed) = &self.allowed {
                let _ = allowed.recv();
            }
            let _ = self.told.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn queue(allowed: Option<Receiver<()>>) -> (LogQueue, LogThread, Receiver<Vec<u8>>) {
        let (told, written) = channel();
        let (queue, thread) = LogQueue::start(Output { told, allowed }).unwrap();
        (queue, thread, written)
    }

    #[test]
    fn every_line_is_written_whole_and_in_order_and_the_last_ones_before_the_end() {
        let (mut queue, thread, written) = queue(None);
        let mut expected = Vec::new();
        for number in 0..1_000 {
            let line = format!("line {number}\n");
            queue.write_all(line.as_bytes()).unwrap();
            expected.extend_from_slice(line.as_bytes());
        }
        drop(thread);
        let all: Vec<u8> = written.try_iter().flatten().collect();
        assert_eq!(all, expected);
        assert_eq!(queue.dropped(), 0);
    }

    #[test]
    fn lines_that_come_while_others_are_written_go_out_together() {
        let (allow, allowed) = channel();
        let (mut queue, thread, written) = queue(Some(allowed));
        queue.write_all(b"first\n").unwrap();
        while !queue.0.state.lock().lines.is_empty() {
            thread::yield_now();
        }
        for _ in 0..100 {
            queue.write_all(b"more\n").unwrap();
        }
        drop(allow);
        drop(thread);
        assert_eq!(written.iter().count(), 2);
    }

    #[test]
    fn an_output_that_stalls_costs_lines_beyond_the_bound_and_holds_nobody() {
        let (allow, allowed) = channel();
        let (mut queue, thread, written) = queue(Some(allowed));
        let line = vec![b'x'; QUEUE_BYTES / 8];
        queue.write_all(b"stalls\n").unwrap();
        while !queue.0.state.lock().lines.is_empty() {
            thread::yield_now();
        }
        for _ in 0..10 {
            queue.write_all(&line).unwrap();
        }
        assert_eq!(queue.dropped(), 2);
        drop(allow);
        drop(thread);
        let bytes: usize = written.iter().map(|part| part.len()).sum();
        assert_eq!(bytes, "stalls\n".len() + QUEUE_BYTES);
    }
}
