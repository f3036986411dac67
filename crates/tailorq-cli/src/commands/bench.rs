//! `tailorq bench`: how fast a model runs here, beside what the memory of this machine gives.

use super::engine::{Engine, EngineArgs, decoder};
use crate::console::Console;
use crate::progress::Progress;
use clap::Args;
use serde_json::{Value, json};
use tailorq::OpenedModel;
use tailorq_runtime::{
    BENCH_START, BenchOptions, BenchReport, BenchStage, DecoderSize, KvType, Spread, bench, bench_decoding,
};

/// Measure how fast a model runs, beside what the memory gives.
///
/// Reads a prompt of random tokens, generates greedily from a short one (nothing ends it early), and in between reads a
/// buffer that no cache holds, with the same threads. Decoding is reading weights: the share of the memory's rate says how
/// much faster it could be. On a GPU that holds packed weights as they are, the memory's rate is that of copies inside the device's
/// memory, bytes read and written. Start times are those of this process, with the file in the system's cache or not, as it was.
#[derive(Args)]
#[command(after_help = "Examples:
  tailorq bench ./my-model
  tailorq bench ./my-model --threads 1 --generate 128 --repeat 5
  tailorq bench model.gguf --prompt 0 --batch 8 --json")]
pub struct BenchArgs {
    /// Directory, GGUF file or hub id
    model: String,
    /// Tokens of the prompt (0: do not measure prompts)
    #[arg(long, default_value_t = 512, value_name = "N")]
    prompt: usize,
    /// Tokens that each sequence generates (0: do not measure generation)
    #[arg(long, default_value_t = 64, value_name = "N")]
    generate: usize,
    /// Sequences that generate together
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// How often everything is measured; medians are shown
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    repeat: u16,
    /// Seed of the random tokens
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// MiB of the buffer that measures the memory; make it larger where a cache could hold it
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u16).range(1..=16384))]
    memory: u16,
    #[command(flatten)]
    engine: EngineArgs,
}

impl BenchArgs {
    fn options(&self, kv: KvType) -> BenchOptions {
        BenchOptions {
            prompt: self.prompt,
            generate: self.generate,
            batch: usize::from(self.batch),
            repeat: usize::from(self.repeat),
            seed: self.seed,
            kv,
            memory_bytes: usize::from(self.memory) << 20,
        }
    }
}

/// Runs the command.
pub fn execute(args: &BenchArgs, threads: usize, console: &Console) -> anyhow::Result<()> {
    let opened = super::open(&args.model, console)?;
    let engine = args.engine.open(&opened.model, console)?;
    let kv = if let Engine::Operations { kv, .. } = &engine { *kv } else { KvType::F16 };
    let options = args.options(kv);
    let n_steps = 1 + 3 * options.repeat;
    let progress = Progress::new(console, "bench", n_steps);
    let on_stage = &mut |stage, repeat| {
        let (place, what) = match stage {
            BenchStage::FirstToken => (0, "first token"),
            BenchStage::Prompt => (1, "prompt"),
            BenchStage::Generate => (2, "generation"),
            BenchStage::Memory => (3, "memory"),
        };
        progress.step_with(3 * repeat + place, n_steps, what)
    };
    let (device, report) = match &engine {
        Engine::Operations { device, .. } => {
            (device.name(), bench(&opened.model, device.as_ref(), &options, on_stage)?)
        }
        Engine::Decoders(decoders) => {
            let capacity = options.prompt.max(BENCH_START + options.generate);
            let size = DecoderSize { sequences: options.batch, capacity };
            let mut decoder = decoder(decoders.as_ref(), &opened.model, size)?;
            (decoder.name(), bench_decoding(&opened.model, decoder.as_mut(), &options, on_stage)?)
        }
    };
    drop(progress);
    let run = Run { args, options, threads, device, engine: &engine, opened: &opened, report: &report };
    console.object(&run.object())?;
    console.text(&run.table())
}

/// Everything that is said about a measurement.
struct Run<'a> {
    args: &'a BenchArgs,
    options: BenchOptions,
    threads: usize,
    device: String,
    engine: &'a Engine,
    opened: &'a OpenedModel,
    report: &'a BenchReport,
}

impl Run<'_> {
    /// Seconds to open the weights, the tokenizer, and until the first token after both.
    fn start(&self) -> [f64; 3] {
        let times = self.opened.times;
        [times.model, times.tokenizer, self.report.first_token].map(|time| time.as_secs_f64())
    }

    fn object(&self) -> Value {
        let (report, options, files) = (self.report, &self.options, &self.opened.files);
        let spread = |s: Spread| json!({ "median": s.median, "min": s.min, "max": s.max });
        let step = report.step;
        let [model, tokenizer, first] = self.start();
        let (activations, kv) = self.engine.precisions();
        json!({
            "model": self.args.model,
            "stored_as": files.stored_as,
            "device": self.device,
            "threads": self.threads,
            "activations": activations,
            "kv": kv,
            "prompt_tokens": options.prompt,
            "generated_tokens": options.generate,
            "start_tokens": BENCH_START,
            "batch": options.batch,
            "repeat": options.repeat,
            "seed": options.seed,
            "prompt_tokens_per_second": report.prompt.map(spread),
            "generated_tokens_per_second": report.generate.map(spread),
            "bytes_per_step": {
                "linears": step.linears,
                "head": step.head,
                "rest": step.rest,
                "kv": step.kv,
                "total": step.total(),
            },
            "bytes_per_token": step.total() / options.batch,
            "read_bytes_per_second": report.read.map(spread),
            "memory_bytes_per_second": spread(report.memory),
            "memory_buffer_bytes": options.memory_bytes,
            "share_of_memory_rate": report.share.map(spread),
            "start_seconds": {
                "model": model, "tokenizer": tokenizer, "first_token": first, "total": model + tokenizer + first
            },
            "peak_resident_bytes": report.peak_memory,
            "weight_file_bytes": files.weight_bytes,
        })
    }

    fn table(&self) -> String {
        let (report, options, files) = (self.report, &self.options, &self.opened.files);
        let rate = |s: Spread| format!("{:.1} tokens/s ({:.1} to {:.1})", s.median, s.min, s.max);
        let giga = |s: Spread| format!("{:.1} GB/s ({:.1} to {:.1})", s.median / 1e9, s.min / 1e9, s.max / 1e9);
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / super::MIB);
        let [model, tokenizer, first] = self.start();
        let mut lines = vec![
            ("model", format!("{} ({})", self.args.model, files.stored_as)),
            ("runs on", format!("{}, {} threads; median of {}", self.device, self.threads, options.repeat)),
        ];
        if let Some(speed) = report.prompt {
            lines.push(("prompt", format!("{}, {} tokens", rate(speed), options.prompt)));
        }
        if let (Some(speed), Some(read), Some(share)) = (report.generate, report.read, report.share) {
            let sequences = if options.batch == 1 { "" } else { &format!(", {} sequences together", options.batch) };
            lines.push(("generation", format!("{}, {} tokens{sequences}", rate(speed), options.generate)));
            let step = report.step;
            let [linears, head, rest, kv] = [step.linears, step.head, step.rest, step.kv].map(|b| b as f64 / 1e6);
            let parts = format!("linears {linears:.1}, head {head:.1}, norms {rest:.1}, keys and values {kv:.1}");
            lines.push(("a step reads", format!("{:.1} MB: {parts}", step.total() as f64 / 1e6)));
            let percent = [share.median, share.min, share.max].map(|s| 100.0 * s);
            let share = format!("{:.0} % of the memory ({:.0} to {:.0})", percent[0], percent[1], percent[2]);
            lines.push(("reading", format!("{}: {share}", giga(read))));
        }
        let how = match self.engine {
            Engine::Operations { .. } => format!("best of several passes over {} MiB", options.memory_bytes >> 20),
            Engine::Decoders(_) => "copies inside the device's memory, read and written".to_owned(),
        };
        lines.push(("memory", format!("{}, {how}", giga(report.memory))));
        let total = model + tokenizer + first;
        let [model, tokenizer, first, total] = [model, tokenizer, first, total].map(|s| 1e3 * s);
        let parts = format!("model {model:.1}, tokenizer {tokenizer:.1}, then {first:.1} to the first token");
        lines.push(("start", format!("{total:.0} ms: {parts}")));
        let peak = report.peak_memory.map_or("unknown".to_owned(), mib);
        lines.push(("memory held", format!("{peak} at most; the weights' files have {}", mib(files.weight_bytes))));
        lines.iter().map(|(name, value)| format!("{name:<13} {value}\n")).collect()
    }
}
