//! Tiny random models to measure.
#![allow(dead_code, reason = "each test binary uses some of it")]
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use tailorq_eval::Subject;
use tailorq_model::OpenedModel;
use tailorq_model::testing::TinyModel;
use tailorq_runtime::Device;

pub fn open(path: &Path) -> OpenedModel {
    tailorq_model::open(path.to_str().unwrap()).unwrap()
}

/// A model of this seed, otherwise changed. Its files are memory-mapped, so they may lose their names.
pub fn tiny(seed: u64, change: impl FnOnce(&mut TinyModel)) -> OpenedModel {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = TinyModel::new("qwen2", seed).unwrap();
    change(&mut tiny);
    tiny.write_directory(dir.path()).unwrap();
    open(dir.path())
}

pub fn subject<'a>(name: &'a str, opened: &'a OpenedModel, device: &'a dyn Device) -> Subject<'a> {
    let OpenedModel { model, tokenizer, template, .. } = opened;
    Subject { name, model, tokenizer, template: template.as_ref(), device, decoders: None }
}

pub fn go_on(_done: usize, _total: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A model and where it runs.
pub struct Fixture {
    pub opened: OpenedModel,
    pub device: Arc<dyn Device>,
}

impl Fixture {
    pub fn of(opened: OpenedModel) -> Self {
        Fixture { opened, device: tailorq_kernels::cpu() }
    }

    pub fn new(seed: u64, change: impl FnOnce(&mut TinyModel)) -> Self {
        Fixture::of(tiny(seed, change))
    }

    pub fn subject(&self) -> Subject<'_> {
        subject("tiny", &self.opened, self.device.as_ref())
    }
}
