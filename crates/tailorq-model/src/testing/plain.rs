//! A decoder made of operations: what those who generate may expect of any other.

use crate::decoder::{Decoder, DecoderError, DecoderSize, Decoders};
use crate::kv::KvCache;
use crate::model::Model;
use crate::workspace::Workspace;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tailorq_kernels::Device;

/// Makes [`PlainDecoder`]s.
pub struct PlainDecoders {
    device: Arc<dyn Device>,
    sequences: usize,
    /// Tokens that all decoders have read so far, those that they chose not counted.
    pub n_read: Arc<AtomicUsize>,
}

impl PlainDecoders {
    /// Of up to so many sequences at once.
    pub fn new(device: Arc<dyn Device>, sequences: usize) -> Self {
        PlainDecoders { device, sequences, n_read: Arc::default() }
    }
}

impl Decoders for PlainDecoders {
    fn open(&self, model: &Model, size: DecoderSize) -> Result<Box<dyn Decoder>, DecoderError> {
        if size.sequences == 0 || size.sequences > self.sequences {
            return Err(DecoderError::new(format!("{} sequences: it takes 1 to {}", size.sequences, self.sequences)));
        }
        Ok(Box::new(PlainDecoder {
            model: model.clone(),
            device: self.device.clone(),
            capacity: size.capacity,
            caches: vec![KvCache::new(); size.sequences],
            logits: vec![Vec::new(); size.sequences],
            workspace: Workspace::new(),
            n_read: self.n_read.clone(),
        }))
    }

    fn most_sequences(&self) -> usize {
        self.sequences
    }

    fn signature(&self) -> String {
        "plain".to_owned()
    }
}

/// See the module.
pub struct PlainDecoder {
    model: Model,
    device: Arc<dyn Device>,
    capacity: usize,
    caches: Vec<KvCache>,
    logits: Vec<Vec<f32>>,
    workspace: Workspace,
    n_read: Arc<AtomicUsize>,
}

impl Decoder for PlainDecoder {
    fn name(&self) -> String {
        format!("plain decoder on {}", self.device.name())
    }

    fn sequences(&self) -> usize {
        self.caches.len()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn weight_bytes(&self) -> (usize, usize) {
        let linears = self.model.blocks.iter().flat_map(|block| &block.linears);
        (linears.map(|linear| linear.weight.reader().bytes()).sum(), self.model.head.reader().bytes())
    }

    fn kv_bytes(&self, tokens: usize) -> usize {
        tokens * KvCache::token_bytes(KvCache::new().kind(), &self.model.config)
    }

    fn copy_rate(&mut self) -> f64 {
        1e9
    }

    fn truncate(&mut self, sequence: usize, tokens: usize) {
        self.caches[sequence].truncate(tokens);
    }

    fn share(&mut self, from: usize, to: usize, tokens: usize) -> Result<(), DecoderError> {
        assert!(from != to && tokens <= self.caches[from].len(), "a beginning of another sequence");
        self.caches[to] = self.caches[from].clone();
        self.caches[to].truncate(tokens);
        Ok(())
    }

    fn read(&mut self, sequence: usize, ids: &[u32]) -> Result<(), DecoderError> {
        let cache = &mut self.caches[sequence];
        if ids.is_empty() || cache.len() + ids.len() > self.capacity {
            return Err(DecoderError::new(format!("{} tokens in room for {}", cache.len() + ids.len(), self.capacity)));
        }
        self.n_read.fetch_add(ids.len(), Ordering::Relaxed);
        self.logits[sequence] = self.model.read_prompt(&*self.device, ids, cache, &mut self.workspace).to_vec();
        Ok(())
    }

    fn logits(&mut self, sequence: usize, logits: &mut Vec<f32>) {
        logits.clone_from(&self.logits[sequence]);
    }

    fn choose(&mut self, sequences: &[usize], n: usize) -> Result<Vec<Vec<u32>>, DecoderError> {
        let mut chosen = vec![Vec::new(); sequences.len()];
        for (chosen, &sequence) in chosen.iter_mut().zip(sequences) {
            let cache = slice::from_mut(&mut self.caches[sequence]);
            for _ in 0..n {
                let logits = &mut self.logits[sequence];
                let best = logits.iter().enumerate().fold(0, |best, (i, l)| if *l > logits[best] { i } else { best });
                chosen.push(best as u32);
                if cache[0].len() < self.capacity {
                    *logits = self.model.step(&*self.device, &[best as u32], cache, &mut self.workspace).to_vec();
                }
            }
        }
        Ok(chosen)
    }
}
