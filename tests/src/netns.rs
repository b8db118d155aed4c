//! Providers on lines of their own: network namespaces behind bridges, with uplinks as slow as asked.
//!
//! ```text
//! this machine        hub namespace                             namespaces of the nodes
//! us…h  10.x.y.1 ---- bridge 0 ---- bridge 1 (a site) --------- eth0  10.x.y.10   tbf: its uplink
//!                          \        tbf both ways: its trunk \-- eth0  10.x.y.11
//! ```
//! Every node knows the link addresses of all others from the start: behind real lines nobody asks for
//! them across the line, where an answer that waits behind data for three seconds is "no route".
//!
//! Nothing of it stays: the namespaces go when the value is dropped, and with them every interface,
//! because one end of each lies in one of them. What a test that was killed left behind goes when
//! the next begins: names carry the number of the process that made them, and only names that begin
//! with the own prefix are touched.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Every namespace of ours is called so, with the process and a number behind it.
const PREFIX: &str = "us-net-";
/// What a queue holds at most: how late a packet may be before it is dropped.
const QUEUE: &str = "2s";

/// Says loudly that a test cannot run here, and whether it may go on.
///
/// # Panics
/// In CI, where namespaces are part of what must hold.
pub fn namespaces_are_here() -> bool {
    let can = rustix::process::geteuid().is_root()
        && ["ip", "tc"].iter().all(|tool| Command::new(tool).arg("-V").output().is_ok())
        && can_make_one();
    if !can {
        let message = "NOT TESTED: this test needs root, `ip netns` and `tc`";
        assert!(std::env::var_os("CI").is_none(), "{message}");
        eprintln!("\n{message}\n");
    }
    can
}

fn can_make_one() -> bool {
    sweep();
    let name = format!("{PREFIX}{}-try", std::process::id());
    let tbf = ["dev", "lo", "root", "tbf", "rate", "1mbit", "burst", "5kb", "latency", QUEUE];
    let made = try_ip(&["netns", "add", &name]).is_ok()
        && try_run("tc", &[&["-n", &name, "qdisc", "add"][..], &tbf[..]].concat()).is_ok();
    let _ = try_ip(&["netns", "del", &name]);
    made
}

fn try_run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Runs many `ip` commands of one namespace at once.
fn ip_batch(namespace: Option<&str>, lines: &str) {
    let mut command = Command::new("ip");
    command.args(namespace.iter().flat_map(|name| ["-n", name])).args(["-batch", "-"]);
    let mut child = command.stdin(Stdio::piped()).spawn().expect("ip");
    // Dropped with the statement: that ends what it reads.
    child.stdin.take().expect("piped").write_all(lines.as_bytes()).expect("written");
    assert!(child.wait().expect("ip").success(), "ip -batch: {lines}");
}

fn try_ip(arguments: &[&str]) -> Result<String, String> {
    try_run("ip", arguments)
}

fn ip(arguments: &[&str]) -> String {
    try_ip(arguments).unwrap_or_else(|error| panic!("{error}"))
}

/// Removes namespaces that tests left which run no more.
fn sweep() {
    let listed = try_ip(&["netns", "list"]).unwrap_or_default();
    for name in listed.lines().filter_map(|line| line.split_whitespace().next()) {
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        let owner = rest.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(owner).exists() {
            remove(name);
        }
    }
}

/// Ends what runs in a namespace and removes it.
fn remove(name: &str) {
    let pids = try_ip(&["netns", "pids", name]).unwrap_or_default();
    for pid in pids.lines().filter_map(|line| line.trim().parse().ok()) {
        if let Some(pid) = rustix::process::Pid::from_raw(pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    let _ = try_ip(&["netns", "del", name]);
}

/// How fast a line is, as `tc` takes it ("128kbit"); `None`: as fast as the machine.
pub type Rate = Option<&'static str>;

/// A network of nodes, numbered from 0.
#[derive(Debug)]
pub struct Net {
    name: String,
    subnet: String,
    nodes: usize,
    sites: usize,
}

impl Net {
    /// `nodes` nodes whose uplinks and downlinks are this fast. With `sites` over 1 node n is in site
    /// n modulo it, and each site's trunk is as fast as `trunk` both ways.
    ///
    /// # Panics
    /// When the system refuses: ask [`namespaces_are_here`] first.
    pub fn new(nodes: usize, up: Rate, down: Rate, sites: usize, trunk: Rate) -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        sweep();
        let (pid, number) = (std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let name = format!("{PREFIX}{pid}-{number}");
        let subnet = format!("10.{}.{}", 64 + pid % 128, (pid / 128 + number) % 256);
        // From here on a panic cleans up.
        let net = Self { name, subnet, nodes, sites: sites.max(1) };
        let hub = net.hub();
        ip(&["netns", "add", &hub]);
        for site in 0..=net.sites {
            ip(&["-n", &hub, "link", "add", &format!("b{site}"), "type", "bridge"]);
            ip(&["-n", &hub, "link", "set", &format!("b{site}"), "up"]);
        }
        for site in 1..=net.sites {
            let (core, own) = (format!("c{site}"), format!("t{site}"));
            ip(&["-n", &hub, "link", "add", &core, "type", "veth", "peer", "name", &own]);
            net.plug(&hub, &core, "b0", trunk);
            net.plug(&hub, &own, &format!("b{site}"), trunk);
        }
        // The machine's own end lies outside; its other end takes it along.
        let host = format!("us{pid}h{number}");
        let end = ["peer", "name", &host, "netns", &pid.to_string()];
        ip(&[&["-n", &hub, "link", "add", "host", "type", "veth"][..], &end[..]].concat());
        net.plug(&hub, "host", "b0", None);
        ip(&["address", "add", &format!("{}.1/24", net.subnet), "dev", &host]);
        ip(&["link", "set", &host, "address", HOST_LINK, "up"]);
        for node in 0..nodes {
            let namespace = net.namespace(node);
            ip(&["netns", "add", &namespace]);
            let port = format!("n{node}");
            let peer = ["peer", "name", "eth0", "netns", &namespace];
            ip(&[&["-n", &hub, "link", "add", &port, "type", "veth"][..], &peer[..]].concat());
            net.plug(&hub, &port, &format!("b{}", 1 + node % net.sites), down);
            limit(&namespace, "eth0", up);
            let address = format!("{}/24", net.address(node));
            ip(&["-n", &namespace, "address", "add", &address, "dev", "eth0"]);
            ip(&["-n", &namespace, "link", "set", "eth0", "address", &link(node), "up"]);
            ip(&["-n", &namespace, "link", "set", "lo", "up"]);
            let known = (0..nodes).filter(|other| *other != node);
            let known = known.map(|other| (net.address(other), link(other)));
            let known = known.chain([(net.host(), HOST_LINK.to_owned())]);
            ip_batch(Some(&namespace), &neighbours(known, "eth0"));
        }
        let known = (0..nodes).map(|node| (net.address(node), link(node)));
        ip_batch(None, &neighbours(known, &host));
        net
    }

    /// Puts an interface of the hub on a bridge; what leaves through it is limited.
    fn plug(&self, hub: &str, interface: &str, bridge: &str, rate: Rate) {
        limit(hub, interface, rate);
        ip(&["-n", hub, "link", "set", interface, "master", bridge]);
        ip(&["-n", hub, "link", "set", interface, "up"]);
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.name)
    }

    /// The namespace of a node.
    pub fn namespace(&self, node: usize) -> String {
        format!("{}-{node}", self.name)
    }

    /// The address of a node.
    pub fn address(&self, node: usize) -> String {
        format!("{}.{}", self.subnet, 10 + node)
    }

    /// The address of this machine, as the nodes reach it.
    pub fn host(&self) -> String {
        format!("{}.1", self.subnet)
    }

    /// A command that runs `program` on a node; the process started is the program itself.
    pub fn command(&self, node: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(node)]).arg(program);
        command
    }

    /// Bytes that a node's interface has sent, headers and all.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn sent_bytes(&self, node: usize) -> u64 {
        self.counted(node, "tx")
    }

    /// Bytes that a node's interface has received, headers and all.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn received_bytes(&self, node: usize) -> u64 {
        self.counted(node, "rx")
    }

    fn counted(&self, node: usize, direction: &str) -> u64 {
        let text = ip(&["-n", &self.namespace(node), "-s", "-j", "link", "show", "eth0"]);
        let parsed: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        parsed[0]["stats64"][direction]["bytes"].as_u64().expect("a count")
    }

    /// Nodes.
    pub fn nodes(&self) -> usize {
        self.nodes
    }
}

/// The link address of this machine's end.
const HOST_LINK: &str = "02:75:73:00:00:01";

/// The link address of a node.
fn link(node: usize) -> String {
    format!("02:75:73:01:{:02x}:{:02x}", node / 256, node % 256)
}

/// The commands that make these addresses, and their link addresses, known on an interface.
fn neighbours(known: impl Iterator<Item = (String, String)>, interface: &str) -> String {
    let line = |(address, link)| format!("neigh replace {address} lladdr {link} dev {interface}\n");
    known.map(line).collect()
}

/// Limits what leaves through an interface.
fn limit(namespace: &str, interface: &str, rate: Rate) {
    let Some(rate) = rate else { return };
    let tbf = ["root", "tbf", "rate", rate, "burst", "8kb", "latency", QUEUE];
    let add = ["-n", namespace, "qdisc", "add", "dev", interface];
    try_run("tc", &[&add[..], &tbf[..]].concat()).unwrap_or_else(|error| panic!("{error}"));
}

impl Drop for Net {
    fn drop(&mut self) {
        (0..self.nodes).for_each(|node| remove(&self.namespace(node)));
        remove(&self.hub());
    }
}
