//! What a survey can gather, and the statistics of one block.

use crate::calibrate::{TokenWeight, add_hessian, energies};
use std::ops::Range;
use tailorq_kernels::{Device, GradientSums};
use tailorq_model::{BlockStage, Tap};
use tailorq_tensor::{InputGroup, Matrix, Slot};

/// The statistics that somebody asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The sum of the samples' gradients.
    pub sum: bool,
    /// The sum of their absolute values (TACQ's gradient magnitude).
    pub absolute: bool,
    /// The sum of their squares (the diagonal Fisher information, up to the number of samples).
    pub square: bool,
    /// Hessians by the weight of their tokens, each kind at most once.
    pub hessians: Vec<TokenWeight>,
    /// `|x_t|` of every token and input.
    pub token_norms: bool,
    /// The sum of `x_t^2`, input by input: the diagonal of the plain Hessian.
    pub input_energies: bool,
    /// The mean square of every token's gradient at the output of every linear.
    pub token_energies: bool,
    /// Leave the first token of every sample, an attention sink in many models, out of the Hessians.
    pub without_first: bool,
}

impl Needs {
    /// Whether a backward pass is needed.
    pub fn gradients(&self) -> bool {
        self.sum
            || self.absolute
            || self.square
            || self.token_energies
            || self.hessians.iter().any(|w| w.reads_gradients())
    }

    /// What both ask for.
    pub fn union(mut self, other: &Needs) -> Needs {
        self.sum |= other.sum;
        self.absolute |= other.absolute;
        self.square |= other.square;
        self.token_norms |= other.token_norms;
        self.input_energies |= other.input_energies;
        self.token_energies |= other.token_energies;
        self.without_first |= other.without_first;
        self.hessians.extend(other.hessians.iter().filter(|w| !self.hessians.contains(w)).copied().collect::<Vec<_>>());
        self
    }
}

/// What was gathered of an input that linears share.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupStats {
    /// Which input.
    pub group: InputGroup,
    /// Lower triangles `[in, in]` of the Hessians whose weights do not read gradients; upper triangles are 0.
    pub hessians: Vec<(TokenWeight, Matrix)>,
    /// `|x_t|` of all tokens in the order of the samples; empty unless asked for.
    pub token_norms: Vec<f32>,
    /// `sum_t x_t^2` for each input `[in]`; empty unless asked for.
    pub input_energies: Vec<f64>,
}

/// What was gathered of the gradients of one linear, `[out, in]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerGradients {
    /// Which linear.
    pub slot: Slot,
    /// The sum of the samples' gradients.
    pub sum: Option<Matrix>,
    /// The sum of their absolute values.
    pub absolute: Option<Matrix>,
    /// The sum of their squares.
    pub square: Option<Matrix>,
    /// Lower triangles `[in, in]` of the Hessians whose weights read gradients.
    pub hessians: Vec<(TokenWeight, Matrix)>,
    /// The mean over outputs of the squared gradient, for all tokens in the order of the samples; empty unless asked for.
    pub token_energies: Vec<f32>,
}

/// The statistics of one block over all samples.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockStats {
    /// Which block.
    pub block_idx: usize,
    /// One for each input, in the order of [`InputGroup::ALL`].
    pub groups: Vec<GroupStats>,
    /// One for each linear, in the order of [`Slot::ALL`]; empty without gradients.
    pub layers: Vec<LayerGradients>,
}

impl BlockStats {
    /// Nothing gathered yet.
    pub(super) fn new(stage: &BlockStage<'_>, block_idx: usize, needs: &Needs) -> Self {
        let hessians = |width: usize, reads: bool| {
            let kinds = needs.hessians.iter().filter(move |w| w.reads_gradients() == reads);
            kinds.map(|&w| (w, Matrix::zeros(width, width))).collect::<Vec<_>>()
        };
        let group = |group| GroupStats {
            group,
            hessians: hessians(stage.model.input_width(group), false),
            token_norms: Vec::new(),
            input_energies: vec![0.0; if needs.input_energies { stage.model.input_width(group) } else { 0 }],
        };
        let layer = |slot: Slot| {
            let weight = &stage.block.linear(slot).weight;
            let sum = |wanted: bool| wanted.then(|| Matrix::zeros(weight.rows(), weight.cols()));
            LayerGradients {
                slot,
                sum: sum(needs.sum),
                absolute: sum(needs.absolute),
                square: sum(needs.square),
                hessians: hessians(weight.cols(), true),
                token_energies: Vec::new(),
            }
        };
        let layers = if needs.gradients() { Slot::ALL.map(layer).into() } else { Vec::new() };
        BlockStats { block_idx, groups: InputGroup::ALL.map(group).into(), layers }
    }

    /// Takes in an input of some samples, `x` `[tokens, in]`.
    pub(super) fn add_input(
        &mut self,
        device: &dyn Device,
        (group, x): (InputGroup, &Matrix),
        spans: &[Range<usize>],
        needs: &Needs,
    ) {
        let stats = &mut self.groups[group as usize];
        if needs.token_norms {
            stats.token_norms.extend(device.row_squares(x).into_iter().map(|s| s.sqrt() as f32));
        }
        if needs.input_energies {
            device.column_squares(x, &mut stats.input_energies);
        }
        for (kind, hessian) in &mut stats.hessians {
            add_hessian(device, (x, None), (*kind, needs.without_first, spans), hessian);
        }
    }

    /// Takes in what the linears of one input saw in some samples, the input itself left aside.
    pub(super) fn add_gradients(&mut self, device: &dyn Device, tap: &Tap<'_>, spans: &[Range<usize>], needs: &Needs) {
        for (slot, dy) in tap.gradients {
            let layer = &mut self.layers[slot.index()];
            let sums = GradientSums {
                sum: layer.sum.as_mut(),
                absolute: layer.absolute.as_mut(),
                square: layer.square.as_mut(),
            };
            device.weight_gradients_matrix(dy, tap.input, spans, sums);
            if layer.hessians.is_empty() && !needs.token_energies {
                continue;
            }
            let energies = energies(device, dy);
            for (kind, hessian) in &mut layer.hessians {
                add_hessian(device, (tap.input, Some(&energies)), (*kind, needs.without_first, spans), hessian);
            }
            if needs.token_energies {
                layer.token_energies.extend(energies);
            }
        }
    }

    /// Takes in the statistics of the same block that a peer of `device` gathered of the samples that follow.
    pub(super) fn merge(&mut self, device: &dyn Device, other: BlockStats) {
        let add = |from: &Option<Matrix>, into: &mut Option<Matrix>| {
            if let (Some(from), Some(into)) = (from, into) {
                device.add_from_peer(from, into);
            }
        };
        let add_all = |from: &[(TokenWeight, Matrix)], into: &mut [(TokenWeight, Matrix)]| {
            from.iter().zip(into).for_each(|((_, from), (_, into))| device.add_from_peer(from, into));
        };
        for (group, more) in self.groups.iter_mut().zip(other.groups) {
            add_all(&more.hessians, &mut group.hessians);
            group.token_norms.extend(more.token_norms);
            group.input_energies.iter_mut().zip(more.input_energies).for_each(|(sum, e)| *sum += e);
        }
        for (layer, more) in self.layers.iter_mut().zip(other.layers) {
            add(&more.sum, &mut layer.sum);
            add(&more.absolute, &mut layer.absolute);
            add(&more.square, &mut layer.square);
            add_all(&more.hessians, &mut layer.hessians);
            layer.token_energies.extend(more.token_energies);
        }
    }

    /// The first linear or input whose statistics hold NaN or infinity.
    pub(super) fn not_finite(&self, device: &dyn Device) -> Option<Slot> {
        let bad = |m: &Matrix| !device.is_finite(m);
        let of_layer = |l: &&LayerGradients| {
            let sums = [&l.sum, &l.absolute, &l.square];
            sums.into_iter().flatten().any(bad)
                || l.hessians.iter().any(|(_, h)| bad(h))
                || l.token_energies.iter().any(|x| !x.is_finite())
        };
        let of_group = |g: &&GroupStats| {
            g.hessians.iter().any(|(_, h)| bad(h))
                || g.token_norms.iter().any(|x| !x.is_finite())
                || g.input_energies.iter().any(|x| !x.is_finite())
        };
        let layer = self.layers.iter().find(of_layer).map(|l| l.slot);
        layer.or_else(|| self.groups.iter().find(of_group).map(|g| g.group.slots()[0]))
    }
}
