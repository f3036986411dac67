//! Each instruction set against the portable lanes, operation by operation.

use super::{Isa, LANES, Portable, Simd};
use half::f16;

/// What every operation gives for these inputs, in a row.
#[inline(always)]
fn all_operations<S: Simd>(simd: S, a: &[f32; LANES], b: &[f32; LANES], bits: u64, out: &mut Vec<f32>) {
    let (va, vb) = (simd.load(a), simd.load(b));
    let words = [bits as u32, (bits >> 32) as u32];
    let integers = simd.codes4(words);
    let results = [
        simd.splat(a[0]),
        va,
        simd.add(va, vb),
        simd.sub(va, vb),
        simd.mul(va, vb),
        simd.div(va, vb),
        simd.max(va, vb),
        simd.min(va, vb),
        simd.exp2_integer(simd.sub(integers, simd.splat(8.0))),
        simd.codes2(words[0]),
        simd.codes3(words[0], bits as u16 ^ 0x5a13),
        integers,
        simd.codes8([words[0], words[1], !words[0], words[1].rotate_left(7)]),
        simd.load_partial(&a[..5], 3.0),
        simd.load_f16(&a.map(f16::from_f32)),
        simd.load_i8(&std::array::from_fn(|i| (bits >> (3 * i)) as i8)),
        // Small integers: a fused multiply-add has nothing to round.
        simd.mul_add(integers, simd.codes2(words[0]), simd.splat(3.0)),
    ];
    for value in results {
        let mut lanes = [0.0; LANES];
        simd.store(value, &mut lanes);
        out.extend(lanes);
    }
    let mut short = [0.0; 7];
    simd.store_partial(va, &mut short);
    out.extend(short);
    out.extend([simd.sum(va), simd.largest(vb)]);
}

super::per_isa! {
    fn run(a: &[f32; LANES], b: &[f32; LANES], bits: u64, out: &mut Vec<f32>) = all_operations
}

#[test]
fn every_instruction_set_agrees_with_the_portable_lanes() {
    let mut rng = tailorq_tensor::Rng::new(9);
    for _ in 0..200 {
        let a: [f32; LANES] = std::array::from_fn(|_| rng.normal());
        let b: [f32; LANES] = std::array::from_fn(|_| rng.normal());
        let bits = rng.next_u64();
        let mut expected = Vec::new();
        all_operations(Portable, &a, &b, bits, &mut expected);
        for isa in Isa::available() {
            let mut found = Vec::new();
            run(isa, &a, &b, bits, &mut found);
            assert_eq!(found, expected, "{}", isa.name());
        }
    }
}

#[test]
fn a_nan_in_the_second_place_survives_a_clamp() {
    #[inline(always)]
    fn clamp<S: Simd>(simd: S, x: f32) -> f32 {
        simd.largest(simd.sub(simd.max(simd.splat(-1.0), simd.min(simd.splat(1.0), simd.splat(x))), simd.splat(0.0)))
    }
    #[inline(always)]
    fn first<S: Simd>(simd: S, x: f32, out: &mut [f32; LANES]) {
        simd.store(simd.max(simd.splat(-1.0), simd.min(simd.splat(1.0), simd.splat(x))), out);
    }
    super::per_isa! { fn run_clamp(x: f32) -> f32 = clamp }
    super::per_isa! { fn run_first(x: f32, out: &mut [f32; LANES]) = first }
    for isa in Isa::available() {
        assert_eq!((run_clamp(isa, 5.0), run_clamp(isa, -5.0), run_clamp(isa, 0.5)), (1.0, -1.0, 0.5));
        let mut lanes = [0.0; LANES];
        run_first(isa, f32::NAN, &mut lanes);
        assert!(lanes.iter().all(|v| v.is_nan()), "{}", isa.name());
    }
}
