//! What every program can print about its own command line: completions for shells and manual
//! pages. Hidden subcommands, flattened into the program's own.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Command;

/// The subcommands; flatten them into a program's own.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum CliCommand {
    /// Print the completions for a shell
    #[command(hide = true)]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write it and those of all subcommands into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        dir: Option<PathBuf>,
    },
}

impl CliCommand {
    /// Prints what was asked for, about `program`.
    ///
    /// # Errors
    /// When it cannot be written; a reader that has gone away is none.
    pub fn run(&self, mut program: Command) -> io::Result<()> {
        let mut text = Vec::new();
        match self {
            Self::Completions { shell } => {
                let name = program.get_name().to_owned();
                clap_complete::generate(*shell, &mut program, name, &mut text);
            }
            Self::Man { dir: Some(dir) } => return clap_mangen::generate_to(program, dir),
            Self::Man { dir: None } => clap_mangen::Man::new(program).render(&mut text)?,
        }
        match io::stdout().lock().write_all(&text) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written,
        }
    }
}

/// Every long flag (as `--flag`) and every environment variable of `program` and its subcommands
/// that is not hidden, once each: what docs/configuration.md must name.
pub fn settings(program: &Command) -> Vec<String> {
    let arguments = program.get_arguments().filter(|argument| !argument.is_hide_set());
    let own = arguments.flat_map(|argument| {
        let long = argument.get_long().map(|long| format!("--{long}"));
        let variable = argument.get_env().map(|name| name.to_string_lossy().into_owned());
        long.into_iter().chain(variable)
    });
    let mut all: Vec<_> = own.filter(|name| name != "--help" && name != "--version").collect();
    for command in program.get_subcommands().filter(|command| !command.is_hide_set()) {
        all.extend(settings(command));
    }
    all.sort_unstable();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    #[command(name = "us-thing")]
    struct Args {
        #[command(subcommand)]
        command: Sub,
    }

    #[derive(Debug, clap::Subcommand)]
    enum Sub {
        /// Run it
        Run {
            /// How fast
            #[arg(long, env = "US_SPEED")]
            speed: Option<u8>,
            #[arg(long, hide = true)]
            secret: bool,
        },
        #[command(flatten)]
        Cli(CliCommand),
    }

    #[test]
    fn pages_of_all_commands_are_written() {
        use clap::CommandFactory;
        let dir = tempfile::tempdir().unwrap();
        let args = Args::try_parse_from(["us-thing", "man", dir.path().to_str().unwrap()]);
        let Sub::Cli(command) = args.unwrap().command else { panic!("it is man") };
        command.run(Args::command()).unwrap();
        let page = std::fs::read_to_string(dir.path().join("us-thing-run.1")).unwrap();
        assert!(page.contains("How fast") && !page.contains("secret"), "{page}");
        assert!(dir.path().join("us-thing.1").is_file());
        assert_eq!(settings(&Args::command()), ["--speed", "US_SPEED"]);
        let fish = Args::try_parse_from(["us-thing", "completions", "fish"]);
        assert!(fish.is_ok() && Args::try_parse_from(["us-thing", "completions", "sh1"]).is_err());
    }
}
