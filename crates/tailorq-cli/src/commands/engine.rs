//! The flags of `run`, `chat` and `bench` that say how a model computes, and what computes so.

use crate::console::Console;
use anyhow::{Context, bail, ensure};
use clap::Args;
use std::sync::Arc;
use tailorq::{Activations, Decoders, Device, Model};
use tailorq_runtime::{Decoder, DecoderSize, KvType, Session};

/// Precisions while the model runs.
#[derive(Args)]
#[command(next_help_heading = "Precision")]
pub struct EngineArgs {
    /// Precision in which packed weights meet activations [default: int8 (fast) on the CPU, half precision on a GPU]; f32 is the
    /// reference, for which a GPU unpacks them. Weights of other formats always meet f32
    #[arg(long, value_name = "TYPE")]
    pub activations: Option<Activations>,
    /// How keys and values are kept: f16, q8 (half of that) or f32 (the reference) [default: f16; f32 beside unpacked weights on a
    /// GPU]
    #[arg(long, value_name = "TYPE")]
    pub kv: Option<KvType>,
}

/// Who computes a model.
pub enum Engine {
    /// A device, operation by operation.
    Operations { device: Arc<dyn Device>, kv: KvType, activations: Activations },
    /// A GPU that multiplies packed weights as they are.
    Decoders(Arc<dyn Decoders>),
}

impl EngineArgs {
    /// What computes this model so. What the chosen device does not have is refused.
    pub fn open(&self, model: &Model, console: &Console) -> anyhow::Result<Engine> {
        if model.is_packed()
            && self.activations != Some(Activations::F32)
            && let Some(decoders) = crate::device::decoders()?
        {
            check_packed(self.activations, self.kv)?;
            return Ok(Engine::Decoders(decoders));
        }
        let activations = self.activations.unwrap_or(Activations::Int8);
        let device = crate::device::open_with(activations, console)?;
        if device.resident().is_none() {
            return Ok(Engine::Operations { device, kv: self.kv.unwrap_or(KvType::F16), activations });
        }
        refuse_int8(self.activations)?;
        if let Some(kv @ (KvType::F16 | KvType::Q8)) = self.kv {
            bail!("--kv {kv}: beside unpacked weights a GPU keeps keys and values in f32; leave --kv out");
        }
        Ok(Engine::Operations { device, kv: KvType::F32, activations: Activations::F32 })
    }
}

/// The activations of an evaluation on a GPU, or why it has no such.
pub fn refuse_int8(activations: Option<Activations>) -> anyhow::Result<()> {
    ensure!(
        activations != Some(Activations::Int8),
        "--activations int8 is the CPU's: on a GPU packed weights meet activations in half precision (leave --activations out), \
         or are unpacked (--activations f32)"
    );
    Ok(())
}

fn check_packed(activations: Option<Activations>, kv: Option<KvType>) -> anyhow::Result<()> {
    refuse_int8(activations)?;
    if let Some(kv @ (KvType::F32 | KvType::Q8)) = kv {
        bail!(
            "--kv {kv}: beside packed weights a GPU keeps keys and values in f16; leave --kv out, or compute all in f32 \
             (--activations f32)"
        );
    }
    Ok(())
}

impl Engine {
    /// An empty sequence that can grow to so many tokens, or to the model's context.
    pub fn session<'a>(&'a self, model: &'a Model, tokens: usize) -> anyhow::Result<Session<'a>> {
        Ok(match self {
            Engine::Operations { device, kv, .. } => Session::with(model, device.as_ref(), *kv),
            Engine::Decoders(decoders) => Session::decoding(
                model,
                decoder(decoders.as_ref(), model, DecoderSize { sequences: 1, capacity: tokens })?,
            ),
        })
    }

    /// As `--activations` and `--kv` name what it computes with.
    pub fn precisions(&self) -> (&'static str, &'static str) {
        match self {
            Engine::Operations { kv, activations, .. } => (activations.name(), kv.name()),
            Engine::Decoders(_) => ("f16", KvType::F16.name()),
        }
    }
}

/// A decoder of the model, no larger than its context.
pub fn decoder(decoders: &dyn Decoders, model: &Model, size: DecoderSize) -> anyhow::Result<Box<dyn Decoder>> {
    let most = decoders.most_sequences();
    ensure!(
        size.sequences <= most,
        "a GPU takes up to {most} sequences together beside packed weights, not {}; --activations f32 takes more",
        size.sequences
    );
    decoders.open(model, DecoderSize { capacity: size.capacity.min(model.config.max_positions), ..size }).context(
        "the GPU cannot take this packed model as it is: --activations f32 unpacks it there, --device cpu needs no GPU",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_gpu_has_not_is_refused_with_a_remedy() {
        let refused = |activations, kv| check_packed(activations, kv).map_err(|e| e.to_string());
        assert!(refused(None, None).is_ok() && refused(None, Some(KvType::F16)).is_ok());
        for kv in [KvType::F32, KvType::Q8] {
            let error = refused(None, Some(kv)).unwrap_err();
            assert!(error.contains(&format!("--kv {kv}")) && error.contains("--activations f32"), "{error}");
        }
        assert!(refused(Some(Activations::Int8), None).unwrap_err().contains("leave --activations out"));
    }
}
