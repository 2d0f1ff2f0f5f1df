//! Drives the built program as a user does, on a model and data that are small enough for seconds.

mod bad_input;
mod hub;
mod interruption;
mod ranks;
mod reproduce;
mod run;
mod stages;
mod tiny;
