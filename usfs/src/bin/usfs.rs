//! `usfs`: the file system. See `usfs::cli`.

fn main() -> std::process::ExitCode {
    usfs::cli::main()
}
