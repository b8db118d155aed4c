//! What the end-to-end tests share: a cluster of real processes, workloads with a manifest of what
//! was acknowledged, and polling with a deadline. Nothing here sleeps as synchronisation.

pub mod admin;
pub mod cluster;
pub mod figures;
pub mod handles;
pub mod joining;
pub mod liar;
pub mod manifest;
pub mod netns;
pub mod poll;
pub mod run;
pub mod simulate;
pub mod tier;
pub mod tools;
pub mod tree;
pub mod worker;
