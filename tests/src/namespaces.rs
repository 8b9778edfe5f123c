//! A network of machines on one machine: a namespace with an address of its own for each, joined by
//! a switch. Links can be cut, in both directions or in one (nftables), lose, delay, reorder
//! (NFQUEUE: the packets go through a thread of this process) and double packets. Needs root and
//! the tools; where these cannot be had, it says what is missing, and the test has to say that it
//! left something out.

use crate::weather::{Seen, Weather, WeatherMaker};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where the system keeps the names of network namespaces.
const NAMESPACES: &str = "/run/netns";
/// All our namespaces: this, the process that made it, and a number.
const PREFIX: &str = "durovfs-";
/// Name of the switch: no node's.
const SWITCH: &str = "switch";
/// The device of a machine.
const DEVICE: &str = "eth0";
/// What is put on packets that go through the queue, and on those that may be doubled.
const MARKS: (u32, u32) = (1, 2);
/// How many of the packets of a doubling link are doubled.
const DOUBLED: &str = "0.1";

/// The network. It ends with this value.
#[derive(Debug)]
pub struct Network {
    name: String,
    addresses: BTreeMap<String, Ipv4Addr>,
    // Before the namespaces go.
    weather: BTreeMap<String, WeatherMaker>,
}

impl Network {
    /// Makes a network with these machines.
    ///
    /// # Errors
    /// What cannot be had here.
    pub fn make(machines: &[String]) -> Result<Self, String> {
        static NETWORKS: AtomicU32 = AtomicU32::new(0);
        remove_leftovers();
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let addresses = machines
            .iter()
            .zip(1..)
            .map(|(machine, number)| (machine.clone(), Ipv4Addr::new(10, 0, 0, number)))
            .collect();
        let mut network = Self {
            name: format!("{PREFIX}{}-{number}-", std::process::id()),
            addresses,
            weather: BTreeMap::new(),
        };
        network.make_switch()?;
        for machine in machines {
            network.make_machine(machine)?;
        }
        for machine in machines {
            let maker = WeatherMaker::start(&network.file(machine))
                .map_err(|error| format!("a packet queue (NFQUEUE): {error}"))?;
            network.weather.insert(machine.clone(), maker);
        }
        Ok(network)
    }

    fn namespace(&self, machine: &str) -> String {
        format!("{}{machine}", self.name)
    }

    fn file(&self, machine: &str) -> PathBuf {
        Path::new(NAMESPACES).join(self.namespace(machine))
    }

    fn make_switch(&self) -> Result<(), String> {
        let name = self.namespace(SWITCH);
        ip(&format!("netns add {name}"))?;
        ip(&format!("-n {name} link add name {SWITCH} type bridge"))?;
        ip(&format!("-n {name} link set dev {SWITCH} up"))
    }

    fn make_machine(&self, machine: &str) -> Result<(), String> {
        let (name, switch) = (self.namespace(machine), self.namespace(SWITCH));
        let address = self.addresses[machine];
        let port = format!("port-{}", address.octets()[3]);
        ip(&format!("netns add {name}"))?;
        ip(&format!(
            "-n {switch} link add name {port} type veth peer name {DEVICE} netns {name}"
        ))?;
        ip(&format!("-n {switch} link set dev {port} master {SWITCH}"))?;
        ip(&format!("-n {switch} link set dev {port} up"))?;
        ip(&format!("-n {name} addr add {address}/24 dev {DEVICE}"))?;
        ip(&format!("-n {name} link set dev {DEVICE} up"))?;
        ip(&format!("-n {name} link set dev lo up"))?;
        self.make_rules(machine)
    }

    fn make_rules(&self, machine: &str) -> Result<(), String> {
        let (queued, doubled) = MARKS;
        // Who is in which set changes; the rules do not. Marked before the chain below is reached.
        let rules = format!(
            "table ip durovfs {{
                set cut {{ type ipv4_addr; }}
                set queued {{ type ipv4_addr; }}
                set doubled {{ type ipv4_addr; }}
                chain arriving {{ type filter hook input priority -150;
                    ip saddr @cut drop; ip saddr @queued meta mark set {queued}; }}
                chain leaving {{ type filter hook output priority -150;
                    ip daddr @doubled meta mark set {doubled}; }}
            }}"
        );
        run(self.command(machine, "nft").arg(rules))?;
        // By this name since not every kernel's nftables has a queue of its own.
        let rule = |words: &str| {
            run(self
                .command(machine, "iptables")
                .args(words.split_whitespace()))
        };
        rule(&format!(
            "-A INPUT -p udp -m mark --mark {queued} -j NFQUEUE --queue-num {queued} --queue-bypass"
        ))?;
        for other in self.others(machine) {
            rule(&format!(
                "-A OUTPUT -p udp -d {other} -m mark --mark {doubled} -m statistic \
                 --mode random --probability {DOUBLED} -j TEE --gateway {other}"
            ))?;
        }
        Ok(())
    }

    fn others(&self, machine: &str) -> Vec<Ipv4Addr> {
        let own = self.addresses[machine];
        let all = self.addresses.values().copied();
        all.filter(|address| *address != own).collect()
    }

    /// A machine's address.
    ///
    /// # Panics
    /// When there is no such machine.
    pub fn address(&self, machine: &str) -> Ipv4Addr {
        self.addresses[machine]
    }

    /// A command that runs on a machine. Its process is the program itself.
    pub fn command(&self, machine: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        let mut file = std::ffi::OsString::from("--net=");
        file.push(self.file(machine));
        command.arg(file).arg("--").arg(program);
        command
    }

    fn change(&self, machine: &str, words: &str) {
        let mut nft = self.command(machine, "nft");
        run(nft.arg(words)).expect("change the rules of a machine");
    }

    /// Nothing that one machine sends to the other arrives any more.
    ///
    /// # Panics
    /// When the system does not do it.
    pub fn cut_one_way(&self, from: &str, to: &str) {
        let from = self.addresses[from];
        self.change(to, &format!("add element ip durovfs cut {{ {from} }}"));
    }

    /// Nothing arrives in either direction.
    ///
    /// # Panics
    /// When the system does not do it.
    pub fn cut_both_ways(&self, one: &str, other: &str) {
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    /// Undoes a [`Self::cut_one_way`].
    ///
    /// # Panics
    /// When the system does not do it.
    pub fn join_one_way(&self, from: &str, to: &str) {
        let from = self.addresses[from];
        self.change(to, &format!("delete element ip durovfs cut {{ {from} }}"));
    }

    /// What happens to the packets that a machine gets, and to those that it sends.
    ///
    /// # Panics
    /// When the system does not do it.
    pub fn set_weather(&self, machine: &str, weather: Weather) {
        let others: Vec<_> = self
            .others(machine)
            .iter()
            .map(ToString::to_string)
            .collect();
        let others = others.join(", ");
        self.weather[machine].set(weather);
        for (set, is_wanted) in [
            ("queued", weather.is_queued()),
            ("doubled", weather.doubles),
        ] {
            let words = if is_wanted {
                format!("add element ip durovfs {set} {{ {others} }}")
            } else {
                format!("flush set ip durovfs {set}")
            };
            self.change(machine, &words);
        }
    }

    /// What became of the packets that a machine got while its weather was bad, so far.
    pub fn weather_seen(&self, machine: &str) -> Seen {
        self.weather[machine].seen()
    }

    /// How many packets of a machine were doubled, so far.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn doubled(&self, machine: &str) -> u64 {
        let mut list = self.command(machine, "iptables");
        let list = list.args(["-n", "-v", "-x", "-L", "OUTPUT"]).output();
        let list = String::from_utf8_lossy(&list.expect("run iptables").stdout).into_owned();
        let rules = list.lines().filter(|line| line.contains("TEE"));
        let count = |rule: &str| rule.split_whitespace().next()?.parse::<u64>().ok();
        rules.map(|rule| count(rule).expect("a count")).sum()
    }

    /// All links are good again.
    ///
    /// # Panics
    /// When the system does not do it.
    pub fn heal(&self) {
        for machine in self.addresses.keys() {
            self.set_weather(machine, Weather::default());
            self.change(machine, "flush set ip durovfs cut");
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.weather.clear();
        for machine in self.addresses.keys().map(String::as_str).chain([SWITCH]) {
            let _ = ip(&format!("netns del {}", self.namespace(machine)));
        }
    }
}

/// Removes what a process left that was killed.
fn remove_leftovers() {
    let Ok(entries) = std::fs::read_dir(NAMESPACES) else {
        return;
    };
    for name in entries.flatten().map(|entry| entry.file_name()) {
        let name = name.to_string_lossy();
        let process = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists()) {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(words: &str) -> Result<(), String> {
    run(Command::new("ip").args(words.split_whitespace()))
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output();
    let output = output.map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{command:?}: {}", errors.trim()))
}
