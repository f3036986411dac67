//! The `tailorq` command. One file a subcommand under `commands/`; printing, progress and exit codes live here and
//! nowhere else.

mod commands;
mod console;
mod device;
mod interrupt;
mod observer;
mod progress;

use clap::{Args, Parser, Subcommand};
use console::Console;
use std::io::Write;
use std::process::ExitCode;

/// Exit code after Ctrl-C, as shells expect it: 128 + SIGINT.
const INTERRUPTED: u8 = 130;
/// Exit code of a command line that cannot work, the same as clap's.
const USAGE: u8 = 2;

/// Cut a language model to the measure of one task: quantize it to 2-3 bits, run it, measure what is left.
///
/// A MODEL is a Hugging Face directory, a directory that tailorq wrote, a GGUF file, or a hub id (`org/name`,
/// `org/name@revision`). Weights stay in the file until they are needed.
#[derive(Parser)]
#[command(name = "tailorq", version, propagate_version = true, max_term_width = 100, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    global: GlobalOptions,
    #[command(flatten)]
    device: device::DeviceArgs,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Results go to standard output, everything else to standard error.";

/// Options of every subcommand.
#[derive(Args)]
struct GlobalOptions {
    /// Threads to compute with [default: as many as this process may run on]. Results do not depend on it
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// No progress and no notes; only results and errors
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Print exactly one JSON object on standard output
    #[arg(long, global = true)]
    json: bool,
    /// Say more on standard error: timings, what was loaded
    #[arg(long, short, global = true, conflicts_with = "quiet")]
    verbose: bool,
}

#[derive(Subcommand)]
enum Command {
    Quantize(Box<commands::quantize::QuantizeArgs>),
    Survey(commands::survey::SurveyArgs),
    Score(commands::score::ScoreCommand),
    Plan(commands::plan::PlanArgs),
    Run(commands::run::RunArgs),
    Chat(commands::chat::ChatArgs),
    Bench(commands::bench::BenchArgs),
    Eval(commands::eval::EvalArgs),
    Compare(commands::compare::CompareArgs),
    Inspect(commands::inspect::InspectArgs),
    Probe(commands::probe::ProbeArgs),
    Plot(commands::plot::PlotArgs),
    Demo(commands::demo::DemoArgs),
}

fn execute(command: Command, threads: usize, console: &Console) -> anyhow::Result<()> {
    match command {
        Command::Bench(args) => commands::bench::execute(&args, threads, console),
        Command::Quantize(args) => commands::quantize::execute(&args, console),
        Command::Survey(args) => commands::survey::execute(&args, console),
        Command::Score(args) => commands::score::execute(&args, console),
        Command::Plan(args) => commands::plan::execute(&args, console),
        Command::Run(args) => commands::run::execute(&args, console),
        Command::Chat(args) => commands::chat::execute(&args, console),
        Command::Eval(args) => commands::eval::execute(&args, console),
        Command::Compare(args) => commands::compare::execute(&args, console),
        Command::Inspect(args) => commands::inspect::execute(&args, console),
        Command::Plot(args) => commands::plot::execute(&args, console),
        Command::Probe(args) => commands::probe::execute(&args, console),
        Command::Demo(args) => commands::demo::execute(&args, console),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let console = Console::new(cli.global.json, cli.global.quiet, cli.global.verbose);
    device::choose(cli.device);
    let outcome =
        prepare(&cli.global, &console).and_then(|threads| tailorq::on_pool(|| execute(cli.command, threads, &console)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

/// Makes the process ready to compute; returns the number of its threads.
fn prepare(global: &GlobalOptions, console: &Console) -> anyhow::Result<usize> {
    interrupt::install()?;
    let threads = tailorq::set_threads(global.threads.map(usize::from)).map_err(anyhow::Error::msg)?;
    console.detail(&format!("{threads} threads"));
    Ok(threads)
}

/// Prints the error with its causes and chooses the exit code.
fn report(error: &anyhow::Error) -> ExitCode {
    // A reader that has seen enough (`| head`) is no failure.
    let closed = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    if error.chain().any(|cause| cause.downcast_ref().is_some_and(closed)) {
        return ExitCode::SUCCESS;
    }
    let mut text = format!("error: {error}\n");
    let mut shown = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // Errors that pass on another's message would say everything twice.
        if !shown.contains(&cause) {
            text.push_str(&format!("  caused by: {cause}\n"));
            shown = cause;
        }
    }
    // Nobody is left to tell when standard error is closed.
    let _ = std::io::stderr().write_all(text.as_bytes());
    use tailorq_eval::EvalError::{BadOption, MissingInput, UnknownTask, UnreadOption};
    let is_usage = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(tailorq::PipelineError::Settings(_)))
            || matches!(
                cause.downcast_ref(),
                Some(UnknownTask { .. } | UnreadOption { .. } | BadOption { .. } | MissingInput { .. })
            )
    };
    if interrupt::requested() {
        ExitCode::from(INTERRUPTED)
    } else if error.chain().any(is_usage) {
        ExitCode::from(USAGE)
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
