//! What a run that is interrupted says.

use std::io::Write;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::ranks::speaks;

/// From now on Ctrl-C, and a scheduler's TERM, end the process as they would, once it has said how to go on.
pub(crate) fn tell_how_to_go_on() {
    // What whoever started it had it ignore, as a script's shell does for what runs behind it, it goes on to ignore.
    let ignored = ignored();
    let heard = [SIGINT, SIGTERM].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
    // Without the means to listen, the process just ends.
    let Ok(mut signals) = Signals::new(heard) else { return };
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if speaks() {
                // A progress bar may stand on this line.
                let _ = writeln!(
                    std::io::stderr(),
                    "\ninterrupted: run the same command with --resume to go on from its last checkpoint"
                );
            }
            let _ = emulate_default_handler(signal);
        }
    });
}

/// The signals that are ignored, a bit each; none where the system does not say.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
