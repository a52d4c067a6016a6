//! What the verifier makes of the programs as they are shipped.

use aya::EbpfLoader;
use aya::programs::Program;

/// Whatever the profile of this build: debug builds embed programs that log as well.
static SHIPPED: &[u8] = aya::include_bytes_aligned!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../target/bpf/undermesh-ebpf"
));

/// A tenth of what the verifier is willing to look at (`BPF_COMPLEXITY_LIMIT_INSNS`): other kernels
/// look at more of the same program.
const BOUND: u32 = 100_000;

/// The lines are read by `cargo xtask test`, which holds them against a file.
#[test]
fn every_program_is_far_from_the_verifiers_bound() {
    let mut loaded = EbpfLoader::new().load(SHIPPED).unwrap();
    let mut names = Vec::new();
    for (name, program) in loaded.programs_mut() {
        match program {
            Program::CgroupSockAddr(program) => program.load().unwrap(),
            Program::SockOps(program) => program.load().unwrap(),
            Program::SkLookup(program) => program.load().unwrap(),
            Program::CgroupSockopt(program) => program.load().unwrap(),
            other => panic!("{name} is {:?}", other.prog_type()),
        }
        let info = program.info().unwrap();
        // 5.16 tells the first; eight bytes are an instruction.
        let verified = info.verified_instruction_count().unwrap();
        let translated = info.size_translated().unwrap() / 8;
        println!(
            "instructions {name} {verified} {translated} {}",
            info.size_jitted()
        );
        assert!(verified < BOUND, "{name}: {verified}");
        names.push(name.to_owned());
    }
    names.sort();
    assert_eq!(
        names,
        [
            "undermesh_connect4",
            "undermesh_connect6",
            "undermesh_lookup",
            "undermesh_setsockopt",
            "undermesh_sock_ops"
        ]
    );
}
