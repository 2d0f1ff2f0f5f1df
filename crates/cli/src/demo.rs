//! `gpusq demo`
use clap::ArgMatches;
pub(crate) fn run(_m: &ArgMatches) -> gpusq::Result<()> {
    Ok(())
}
