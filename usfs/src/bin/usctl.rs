//! `usctl`: looks at a cluster and acts on it. See `usfs::ctl`.

fn main() -> std::process::ExitCode {
    usfs::ctl::main()
}
