//! Real programs from Debian, run inside pods with configuration, data and sockets of their own.
//!
//! Servers are asked for what they counted over unix sockets, which is no traffic of the pod; such a question
//! is a connection to the server all the same, and is taken off its count.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::lab::PodHandle;
use crate::machine;
use crate::process::{Process, tail};

const START: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(5);

/// A server that runs in a pod, and says how many connections it accepted.
#[derive(Debug)]
pub struct Server {
    kind: Kind,
    process: Process,
    socket: PathBuf,
    asked: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Nginx,
    Redis,
}

impl Server {
    /// nginx, which serves `pages` (name and content) on `port`.
    pub fn nginx(pod: &PodHandle, port: u16, pages: &[(&str, &str)]) -> Result<Self> {
        machine::require(&[machine::NGINX])?;
        let dir = pod.record().dir.join("nginx");
        let www = dir.join("www");
        fs::create_dir_all(&www)?;
        for (name, content) in pages {
            fs::write(www.join(name), content)?;
        }
        let listen6 = match pod.ip6() {
            Ok(_) => format!("listen [::]:{port};"),
            Err(_) => String::new(),
        };
        let here = dir.display();
        let configuration = format!(
            "daemon off; user root; worker_processes 1; pid {here}/pid; error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off; default_type text/plain; keepalive_requests 1000000;
  client_body_temp_path {here}/body; proxy_temp_path {here}/proxy; fastcgi_temp_path {here}/fastcgi;
  uwsgi_temp_path {here}/uwsgi; scgi_temp_path {here}/scgi;
  server {{ listen {port} backlog=4096; {listen6} root {here}/www; }}
  server {{ listen unix:{here}/socket; location = /status {{ stub_status; }} }}
}}
"
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, configuration)?;
        let file = file.display().to_string();
        let args = ["-e", "stderr", "-c", &file];
        Self::start(Kind::Nginx, pod, "nginx", &args, dir.join("socket"))
    }

    /// redis-server on `port`, with nothing on disk.
    pub fn redis(pod: &PodHandle, port: u16) -> Result<Self> {
        machine::require(&[machine::REDIS])?;
        let dir = pod.record().dir.join("redis");
        fs::create_dir_all(&dir)?;
        let socket = dir.join("socket");
        let (port, path) = (port.to_string(), socket.display().to_string());
        let dir = dir.display().to_string();
        #[rustfmt::skip]
        let args = [
            "--port", &port, "--protected-mode", "no", "--unixsocket", &path, "--dir", &dir,
            "--save", "", "--appendonly", "no", "--daemonize", "no", "--tcp-backlog", "4096",
        ];
        Self::start(Kind::Redis, pod, "redis-server", &args, socket)
    }

    fn start(
        kind: Kind,
        pod: &PodHandle,
        program: &str,
        args: &[&str],
        socket: PathBuf,
    ) -> Result<Self> {
        let program_path = machine::find(program).context("just installed")?;
        let mut process = pod.spawn(program, &program_path.display().to_string(), args)?;
        let asked = AtomicU64::new(0);
        process.until(&format!("{program} to answer"), START, |_| {
            kind.ask(&socket, &asked)?;
            Ok(true)
        })?;
        Ok(Self {
            kind,
            process,
            socket,
            asked,
        })
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Lets it run on after this program.
    pub fn leave_running(self) {
        self.process.leave_running();
    }

    /// TCP connections that it accepted, as it counts them itself.
    pub fn accepted(&self) -> Result<u64> {
        self.kind.ask(&self.socket, &self.asked)
    }
}

impl Kind {
    fn ask(self, socket: &Path, asked: &AtomicU64) -> Result<u64> {
        let stream = UnixStream::connect(socket)?;
        let asked = asked.fetch_add(1, Ordering::SeqCst) + 1;
        stream.set_read_timeout(Some(ANSWER))?;
        let counted = match self {
            Self::Nginx => nginx_accepts(stream)?,
            Self::Redis => redis_connections(stream)?,
        };
        counted
            .checked_sub(asked)
            .context("it counted fewer connections than it was asked over")
    }
}

/// ngx_http_stub_status_module: the first number of the third line.
fn nginx_accepts(mut stream: UnixStream) -> Result<u64> {
    stream.write_all(b"GET /status HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    text.split_once("requests\n")
        .and_then(|(_, rest)| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("stub_status: {text:?}"))
}

/// INFO stats, an inline command.
fn redis_connections(mut stream: UnixStream) -> Result<u64> {
    stream.write_all(b"INFO stats\r\n")?;
    for line in BufReader::new(stream).lines() {
        if let Some(number) = line?.strip_prefix("total_connections_received:") {
            return Ok(number.trim().parse()?);
        }
    }
    bail!("redis did not say how many connections it received")
}

/// What one run of curl saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// Connections that it opened.
    pub connections: u64,
    /// HTTP status of the last transfer, 0 if there was none.
    pub status: u16,
    /// Bytes of the last body.
    pub bytes: u64,
    /// What curl(1) exits with: 0 is success.
    pub exit: i32,
}

/// Fetches `url` with curl from inside a pod, with a header `X-Marker`.
pub fn curl(pod: &PodHandle, url: &str, marker: &str) -> Result<Fetch> {
    machine::require(&[machine::CURL])?;
    let header = format!("X-Marker: {marker}");
    let format = "%{num_connects} %{http_code} %{size_download}";
    #[rustfmt::skip]
    let args = [
        "--silent", "--output", "/dev/null", "--max-time", "20", "--header", &header,
        "--write-out", format, url,
    ];
    let output = pod.place().output("curl", &args)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut numbers = text.split_whitespace();
    let mut next = || numbers.next().and_then(|number| number.parse::<u64>().ok());
    let (Some(connections), Some(status), Some(bytes)) = (next(), next(), next()) else {
        bail!(
            "curl in {}: {}: {text}{}",
            pod.name(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    };
    Ok(Fetch {
        connections,
        status: u16::try_from(status)?,
        bytes,
        exit: output.status.code().unwrap_or(-1),
    })
}

/// Runs `redis-benchmark` from inside a pod: `clients` connections, `requests` SETs of `value`. An error if it
/// says that anything went wrong.
pub fn redis_benchmark(
    pod: &PodHandle,
    to: SocketAddr,
    clients: u32,
    requests: u32,
    value: &str,
) -> Result<()> {
    machine::require(&[machine::REDIS_TOOLS])?;
    let (host, port) = (to.ip().to_string(), to.port().to_string());
    let (clients, requests) = (clients.to_string(), requests.to_string());
    #[rustfmt::skip]
    let args = [
        "-h", &host, "-p", &port, "-c", &clients, "-n", &requests, "-q", "SET", "key", value,
    ];
    let output = pod.run("redis-benchmark", &args)?;
    if !output.contains("requests per second") {
        bail!("redis-benchmark in {}: {output}", pod.name());
    }
    Ok(())
}

/// Where Debian keeps the programs of PostgreSQL's newest version.
pub fn postgres_programs() -> Result<PathBuf> {
    machine::require(&[machine::POSTGRES])?;
    let mut versions: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .context("/usr/lib/postgresql")?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .collect();
    versions.sort();
    let (_, newest) = versions.pop().context("no version of PostgreSQL")?;
    Ok(newest)
}

/// PostgreSQL on `port`, with a fresh cluster of its own, run as the user `postgres`; trusts everybody.
pub fn postgres(pod: &PodHandle, port: u16) -> Result<Process> {
    let programs = postgres_programs()?;
    let dir = pod.record().dir.join("postgres");
    fs::create_dir_all(&dir)?;
    let here = dir.display().to_string();
    let data = format!("{here}/data");
    pod.run("chown", &["postgres:", &here])?;
    let program = |name: &str| programs.join(name).display().to_string();
    let as_postgres = ["--reuid=postgres", "--regid=postgres", "--clear-groups"];
    let with = |program: &str, args: &[&str]| -> Vec<String> {
        let words = as_postgres.iter().chain([&program]).chain(args);
        words.map(|&word| word.to_owned()).collect()
    };
    let initdb = ["--auth=trust", "--no-sync", "--pgdata", &data];
    pod.run("setpriv", &with(&program("initdb"), &initdb))?;
    let host_based = Path::new(&data).join("pg_hba.conf");
    let mut rules = fs::read_to_string(&host_based)?;
    rules.push_str("host all all all trust\n");
    fs::write(&host_based, rules)?;
    let port_text = port.to_string();
    #[rustfmt::skip]
    let serve = [
        "-D", &data, "-p", &port_text, "-k", &here, "-c", "listen_addresses=*", "-c", "fsync=off",
        "-c", "max_connections=200", "-c", "log_connections=on",
    ];
    let mut process = pod.spawn("postgres", "setpriv", &with(&program("postgres"), &serve))?;
    let socket = dir.join(format!(".s.PGSQL.{port}"));
    process.until("PostgreSQL to listen", START, |postgres| {
        Ok(UnixStream::connect(&socket).is_ok()
            && postgres.output().contains("ready to accept connections"))
    })?;
    Ok(process)
}

/// Where the tests' own Python programs are.
fn script(name: &str) -> String {
    format!("{}/programs/{name}.py", env!("CARGO_MANIFEST_DIR"))
}

/// Starts a server out of `programs/` in a pod, and waits until it says that it is ready.
pub fn python_server(pod: &PodHandle, name: &str, args: &[&str]) -> Result<Process> {
    let script = script(name);
    let args: Vec<&str> = std::iter::once(&*script)
        .chain(args.iter().copied())
        .collect();
    let mut process = pod.spawn(name, machine::DEBIAN_PYTHON, &args)?;
    process.until(&format!("{name} to listen"), START, |process| {
        Ok(process.output().lines().any(|line| line == "ready"))
    })?;
    Ok(process)
}

/// Ends such a server with SIGTERM; gives back what it says about itself.
pub fn python_report(mut server: Process) -> Result<Value> {
    server.stop(Signal::SIGTERM, START)?;
    last_json(&server.output()).with_context(|| tail(server.log(), 10))
}

/// Runs a client out of `programs/` in a pod to its end; gives back what it says.
pub fn python_client(pod: &PodHandle, name: &str, args: &[&str]) -> Result<Value> {
    let script = script(name);
    let args: Vec<&str> = std::iter::once(&*script)
        .chain(args.iter().copied())
        .collect();
    let output = pod.run(machine::DEBIAN_PYTHON, &args)?;
    last_json(&output).with_context(|| output.clone())
}

fn last_json(output: &str) -> Result<Value> {
    let mut lines = output.lines().rev();
    let line = lines
        .find(|line| line.starts_with('{'))
        .context("no report")?;
    Ok(serde_json::from_str(line)?)
}
