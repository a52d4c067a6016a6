//! Attacks on what the kernel holds for the mesh: programs, maps, links and their pins.

use anyhow::{Context, Result};

use super::field::{CAPABILITIES, Field};
use super::trial::AttackResult;
use crate::lab::Side;

/// A mount namespace without the node's directories, as a container has it.
const HIDDEN: [&str; 5] = [
    "--mount",
    "sh",
    "-c",
    "mount -t tmpfs none /run && exec \"$@\"",
    "sh",
];

impl Field<'_> {
    /// bpf(2) and bpffs, from a mount namespace without the node's directories, as a container has it. With
    /// all capabilities, which is the control, the same commands work.
    pub fn kernel_objects(&self) -> Result<AttackResult> {
        // BPF_PROG_GET_NEXT_ID, BPF_MAP_GET_NEXT_ID and BPF_LINK_GET_NEXT_ID: no safe crate has them bare.
        const LOOK: &str = "import ctypes,os,sys
libc=ctypes.CDLL(None,use_errno=True)
got=0
met=''
for command in (11,12,31):
    attr=ctypes.create_string_buffer(128)
    got+=libc.syscall(321 if os.uname().machine=='x86_64' else 280,command,attr,128)==0
    met=os.strerror(ctypes.get_errno())
os.makedirs('/run/b',exist_ok=True)
got+=libc.mount(b'bpf',b'/run/b',b'bpf',0,None)==0
print(got,met)";
        let tried = |lead: &[&str]| -> Result<(u64, String)> {
            let words: Vec<&str> = HIDDEN.iter().chain(lead).copied().collect();
            let words = [words, vec!["/usr/bin/env", "python3", "-c", LOOK]].concat();
            counted(&self.lab.pod("intruder")?.run("unshare", &words)?)
        };
        let (succeeded, log_reason) = tried(&["setpriv", CAPABILITIES])?;
        let (control_succeeded, _) = tried(&[])?;
        Ok(refused_by_the_kernel(
            "kernel_objects",
            4,
            succeeded,
            control_succeeded,
            log_reason,
        ))
    }

    /// The pins of the node's bpffs: to list them, to open a map by its pin, to take a pin away. The control is
    /// root on the node, outside every container, with a pin that stands there for this.
    pub fn pins(&self) -> Result<AttackResult> {
        // BPF_OBJ_PIN and BPF_OBJ_GET take a path and a descriptor; no safe crate has them bare.
        const TRY: &str = "import ctypes,os,struct,sys
do,pins,spare=sys.argv[1:]
libc=ctypes.CDLL(None,use_errno=True)
def bpf(command,path,descriptor=0):
    name=ctypes.create_string_buffer(path.encode())
    packed=struct.pack('QII',ctypes.addressof(name),descriptor,0)
    attr=ctypes.create_string_buffer(packed,128)
    number=321 if os.uname().machine=='x86_64' else 280
    got=libc.syscall(number,command,attr,128)
    if got<0: raise OSError(ctypes.get_errno(),os.strerror(ctypes.get_errno()))
    return got
if do=='make':
    bpf(6,spare,bpf(7,pins+'/pods'))
    sys.exit(print(1,''))
got=0
met=''
for attempt in (lambda:os.listdir(pins),lambda:bpf(7,pins+'/pods'),lambda:os.unlink(spare)):
    try:
        attempt()
        got+=1
    except OSError as error: met=error.strerror
print(got,met)";
        let node = self.lab.node(Side::A)?;
        let status = node.agent().admin("/kernel")?;
        let pins = status["pins"].as_str().context("/kernel names no pins")?;
        let spare = format!("{pins}/spare");
        let words = |action| ["python3", "-c", TRY, action, pins, spare.as_str()];
        counted(&node.place().run("/usr/bin/env", &words("make"))?)?;
        let lead = ["setpriv", CAPABILITIES, "/usr/bin/env"];
        let hidden = [&HIDDEN[..], &lead, &words("try")].concat();
        let (succeeded, met) = counted(&self.lab.pod("intruder")?.run("unshare", &hidden)?)?;
        let (control, _) = counted(&node.place().run("/usr/bin/env", &words("try"))?)?;
        Ok(refused_by_the_kernel("pins", 3, succeeded, control, met))
    }
}

/// No hook of ours ever hears of these, so there is nothing that could count them.
fn refused_by_the_kernel(
    id: &str,
    attempts: u64,
    succeeded: u64,
    control_succeeded: u64,
    log_reason: String,
) -> AttackResult {
    AttackResult {
        id: id.to_owned(),
        attempts,
        succeeded,
        control_succeeded,
        metric: String::new(),
        metric_delta: 0,
        log_reason,
        passed_until_repair: None,
    }
}

/// How much worked, and what was met last.
fn counted(output: &str) -> Result<(u64, String)> {
    let (count, met) = output.trim().split_once(' ').unwrap_or((output.trim(), ""));
    let count = count.parse().with_context(|| output.to_owned())?;
    Ok((count, met.to_owned()))
}
