//! What a run that is interrupted says.

use std::io::Write;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::ranks::speaks;

/// From now on Ctrl-C, and a scheduler's TERM, end the process as they would, once it has said how to go on.
pub(crate) fn tell_how_to_go_on() {
    // Without the means to listen, the process just ends.
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM]) else { return };
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
