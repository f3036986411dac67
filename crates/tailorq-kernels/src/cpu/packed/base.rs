//! What the kernels read of a packed matrix: its base, borrowed once a call.

use super::activations::{LANES, Order};
use super::levels::Levels;
use tailorq_tensor::{Bits, Group, Layout, PackedMatrix, Scales};

/// Least bytes ahead of the codes in hand that are fetched into the cache. Rows follow each other in memory, so a block of
/// rows fetches a later block line by line in the order of memory: several rows at once, each a stream of its own, reach
/// little more than half of what the memory gives.
const AHEAD: usize = 4096;

/// The base of a packed matrix as plain slices.
#[derive(Clone, Copy)]
pub(super) struct Base<'a> {
    pub(super) layout: Layout,
    pub(super) order: Order,
    pub(super) cols: usize,
    /// `[rows, words_per_row]`.
    pub(super) words: &'a [u32],
    pub(super) words_per_row: usize,
    /// `[rows, words_per_row]` with 3 and 6 bits, the high bits of a word's codes beside it; else empty.
    pub(super) highs: &'a [u16],
    /// `[rows, groups]`, in their width.
    pub(super) scales: Scales<'a>,
    pub(super) groups: usize,
    /// `[rows, zero_bytes]`, empty when the layout is symmetric.
    pub(super) zeros: &'a [u8],
    pub(super) zero_bytes: usize,
    /// What codes stand for with a codebook.
    pub(super) levels: Option<Levels>,
}

impl<'a> Base<'a> {
    pub(super) fn of(m: &'a PackedMatrix) -> Self {
        let (layout, cols, parts) = (m.layout(), m.cols(), m.parts());
        let tiles = m.tiles_per_row();
        Base {
            layout,
            order: Order::of(layout.bits),
            cols,
            words: parts.codes.cast().expect("checked when the matrix was made"),
            words_per_row: tiles * layout.bits.words_per_tile(),
            highs: parts.codes_high.as_ref().map_or(&[], |h| h.cast().expect("checked when the matrix was made")),
            scales: m.stored_scales(),
            groups: layout.group.count(cols),
            zeros: parts.zeros.as_deref().unwrap_or(&[]),
            zero_bytes: layout.zero_bytes_per_row(cols),
            levels: m.levels().map(Levels::of),
        }
    }

    /// Steps of sixteen words in a row.
    pub(super) fn steps(&self) -> usize {
        self.words_per_row.div_ceil(LANES)
    }

    /// Steps that read the same sixteen scales.
    pub(super) fn steps_per_chunk(&self) -> usize {
        match self.layout.group {
            Group::Inputs(n) => LANES * n / self.order.step(),
            Group::Row => self.steps().max(1),
        }
    }

    /// For each step of a chunk, which of the sixteen scales each lane takes.
    fn lane_groups(&self) -> LaneGroups {
        let mut table = LaneGroups { of_step: [Indices([0; LANES]); 32], mask: 0 };
        if let Group::Inputs(n) = self.layout.group {
            let period = self.steps_per_chunk();
            for (s, indices) in table.of_step[..period].iter_mut().enumerate() {
                for (lane, index) in indices.0.iter_mut().enumerate() {
                    *index = ((s * self.order.step() + lane * self.order.lane()) / n) as i32;
                }
            }
            table.mask = period - 1;
        }
        table
    }

    /// The number that a code is multiplied as.
    pub(super) fn integer(&self, code: u8) -> i32 {
        self.levels.map_or(i32::from(code), |levels| levels.integer(code))
    }

    /// What sums of products are multiplied with in the end.
    pub(super) fn factor(&self) -> f32 {
        self.levels.map_or(1.0, |levels| levels.factor)
    }

    /// The scale of group `g` in a row.
    pub(super) fn scale(&self, row: usize, g: usize) -> f32 {
        self.scales.get(row * self.groups + g).to_f32()
    }

    /// The zero of all groups of a symmetric layout.
    pub(super) fn middle(&self) -> Option<f32> {
        if let Some(levels) = &self.levels {
            return Some(levels.zero);
        }
        self.layout.symmetric.then(|| f32::from(self.layout.bits.middle()))
    }

    /// The zero of group `g` in a row.
    pub(super) fn zero(&self, row: usize, g: usize) -> f32 {
        if let Some(middle) = self.middle() {
            return middle;
        }
        let bits = self.bits();
        let row = &self.zeros[row * self.zero_bytes..(row + 1) * self.zero_bytes];
        let at = g * bits;
        let two = u16::from(row[at / 8]) | u16::from(row.get(at / 8 + 1).copied().unwrap_or(0)) << 8;
        f32::from(two >> (at % 8) & ((1 << bits) - 1))
    }

    /// Width of a code and of a packed zero.
    pub(super) fn bits(&self) -> usize {
        self.layout.bits.count() as usize
    }

    /// Whether there is a plane of high bits.
    pub(super) fn has_highs(&self) -> bool {
        matches!(self.layout.bits, Bits::Three | Bits::Six)
    }
}

/// What all blocks of rows share, made once a call: a block of short rows takes no longer than a few of these divisions.
pub(super) struct Tables {
    /// Steps of a row.
    pub(super) steps: usize,
    /// Steps that read the same sixteen scales.
    pub(super) per_chunk: usize,
    /// Bytes from the first of four rows to what is fetched while they are read: whole blocks of four rows.
    pub(super) ahead: usize,
    pub(super) groups: LaneGroups,
    pub(super) zeros: ZeroBits,
}

impl Tables {
    pub(super) fn of(base: &Base<'_>) -> Self {
        Tables {
            steps: base.steps(),
            per_chunk: base.steps_per_chunk(),
            ahead: AHEAD.next_multiple_of(16 * base.words_per_row.max(1)),
            groups: base.lane_groups(),
            zeros: ZeroBits::new(base.bits()),
        }
    }
}

/// See [`Base::lane_groups`].
pub(super) struct LaneGroups {
    /// At most 32 steps share sixteen scales: 8 bits, groups of 128.
    pub(super) of_step: [Indices; 32],
    /// The step's number modulo the period, which is a power of two.
    pub(super) mask: usize,
}

/// One index a lane.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Indices(pub(super) [i32; LANES]);

/// Takes sixteen numbers of a few bits each out of a bit stream, lane by lane.
pub(super) struct ZeroBits {
    /// For each lane the four bytes from the one on in which its number begins. Bytes past the stream's sixteen hold no bit
    /// of any number, whatever they are.
    pub(super) bytes: Indices,
    /// Where in that byte it begins.
    pub(super) shifts: Indices,
    pub(super) mask: i32,
}

impl ZeroBits {
    fn new(bits: usize) -> Self {
        let table = |f: fn(usize) -> usize| Indices(std::array::from_fn(|lane| f(lane * bits) as i32));
        ZeroBits {
            bytes: table(|at| at / 8 * 0x01_01_01_01 + 0x03_02_01_00),
            shifts: table(|at| at % 8),
            mask: (1 << bits) - 1,
        }
    }
}
