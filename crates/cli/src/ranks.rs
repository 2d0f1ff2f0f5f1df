//! Training by several processes: as which of them this one was started.
//!
//! The variables are those that torchrun sets, so that whatever starts PyTorch's processes starts these too.

use std::env;
use std::io::Read;
use std::thread;
use std::time::Duration;

use clap::ArgMatches;
use gpusq::tensor::{Group, GroupError, Patience, Seat};
use gpusq::{Error, Result};

/// The commands that several processes can run together.
pub(crate) const COMMANDS: [&str; 4] = ["finetune", "prune", "quantize", "compress"];

/// Set by `gpusq launch`, whose end closes the standard input of those that it started.
pub(crate) const LAUNCHED: &str = "GPUSQ_LAUNCHED";

/// Runs `f` with the processes that were started with this one, or alone.
pub(crate) fn with_group(m: &ArgMatches, f: fn(&ArgMatches, &Group) -> Result<()>) -> Result<()> {
    let Some(seat) = seat(&|name| env::var(name).ok())? else { return f(m, Group::alone()) };
    if env::var_os(LAUNCHED).is_some() {
        thread::spawn(|| {
            // Nothing is ever written there, and when it ends, nobody is there to be told.
            let _ = std::io::stdin().read(&mut [0]);
            std::process::exit(1);
        });
    }
    let group = Group::join(seat)?;
    let done = f(m, &group);
    if let Err(e) = &done {
        group.fail(&e.to_string());
    }
    done
}

/// Refuses a command that several processes cannot run together.
pub(crate) fn need_one(command: &str) -> Result<()> {
    match seat(&|name| env::var(name).ok())? {
        None => Ok(()),
        Some(seat) => Err(Error::Config(format!(
            "`gpusq {command}` runs in one process, and WORLD_SIZE is {}; start it once, without that variable",
            seat.size
        ))),
    }
}

/// Whether this process speaks for all: it is rank 0 of its command, or alone.
pub(crate) fn speaks() -> bool {
    let command = env::args_os().nth(1);
    let together = COMMANDS.iter().any(|c| command.as_ref().is_some_and(|given| given == c));
    !together || env::var("RANK").map_or(true, |rank| rank.trim() == "0")
}

/// The GPU of this host that is this process's, if there are several processes.
pub(crate) fn local_rank() -> Result<Option<usize>> {
    let seat = seat(&|name| env::var(name).ok())?;
    seat.map(|_| number(&|name| env::var(name).ok(), "LOCAL_RANK")).transpose()
}

/// Where this process belongs, if it is one of several. `get` gives a variable's value.
fn seat(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Seat>> {
    if get("WORLD_SIZE").is_none_or(|s| s.trim().is_empty()) {
        return match get("RANK") {
            None => Ok(None),
            Some(_) => Err(Error::Config(
                "RANK is set and WORLD_SIZE is not; set WORLD_SIZE to the number of processes, or unset RANK"
                    .into(),
            )),
        };
    }
    let size = number(get, "WORLD_SIZE")?;
    if size < 2 {
        return match size {
            1 => Ok(None),
            _ => Err(Error::Config("WORLD_SIZE is 0; it is the number of processes, at least 1".into())),
        };
    }
    let rank = number(get, "RANK")?;
    if rank >= size {
        let message = format!("RANK is {rank} and WORLD_SIZE {size}; ranks go from 0 to {}", size - 1);
        return Err(Error::Config(message));
    }
    number(get, "LOCAL_RANK")?;
    let address = needed(get, "MASTER_ADDR")?;
    let port = number(get, "MASTER_PORT")?;
    let port = u16::try_from(port)
        .ok()
        .filter(|&p| p != 0)
        .ok_or_else(|| Error::Config(format!("MASTER_PORT is {port}; it must be a port from 1 to 65535")))?;
    let mut patience = Patience::default();
    if get("GPUSQ_JOIN_TIMEOUT").is_some() {
        patience.join = Duration::from_secs(number(get, "GPUSQ_JOIN_TIMEOUT")? as u64);
    }
    Ok(Some(Seat { rank, size, address, port, patience, last_resort }))
}

/// Ends a process that is in the middle of something while others are lost.
fn last_resort(e: &GroupError) {
    crate::fail(&Error::Group(e.clone()));
    std::process::exit(1);
}

fn needed(get: &dyn Fn(&str) -> Option<String>, name: &str) -> Result<String> {
    get(name).map(|v| v.trim().to_string()).filter(|v| !v.is_empty()).ok_or_else(|| {
        Error::Config(format!(
            "{name} is not set, and WORLD_SIZE is; each process needs RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and \
             MASTER_PORT, as `gpusq launch` and torchrun set them"
        ))
    })
}

fn number(get: &dyn Fn(&str) -> Option<String>, name: &str) -> Result<usize> {
    let text = needed(get, name)?;
    text.parse().map_err(|_| Error::Config(format!("{name} is `{text}`; it must be a whole number")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(vars: &[(&str, &str)]) -> Result<Option<Seat>> {
        seat(&|name| vars.iter().find(|v| v.0 == name).map(|v| v.1.to_string()))
    }

    #[test]
    fn variables_say_which_process_this_is_or_what_is_wrong_with_them() {
        let all = [
            ("RANK", "1"),
            ("LOCAL_RANK", "1"),
            ("WORLD_SIZE", "2"),
            ("MASTER_ADDR", "node-3"),
            ("MASTER_PORT", "29500"),
        ];
        let seat = of(&all).unwrap().unwrap();
        assert_eq!((seat.rank, seat.size, seat.address.as_str(), seat.port), (1, 2, "node-3", 29500));
        assert!(of(&[]).unwrap().is_none() && of(&[("WORLD_SIZE", "1")]).unwrap().is_none());
        for (name, _) in all {
            let without: Vec<_> = all.into_iter().filter(|v| v.0 != name).collect();
            let e = of(&without).err().unwrap().to_string();
            assert!(e.contains(&format!("{name} is not")), "{e}");
        }
        for (name, value, what) in [
            ("RANK", "2", "ranks go from 0 to 1"),
            ("RANK", "-1", "RANK is `-1`"),
            ("WORLD_SIZE", "two", "WORLD_SIZE is `two`"),
            ("WORLD_SIZE", "0", "at least 1"),
            ("MASTER_PORT", "70000", "from 1 to 65535"),
            ("MASTER_ADDR", " ", "MASTER_ADDR is not set"),
        ] {
            let changed: Vec<_> =
                all.into_iter().map(|v| if v.0 == name { (name, value) } else { v }).collect();
            let e = of(&changed).err().unwrap().to_string();
            assert!(e.contains(what), "{e}");
        }
    }
}
