//! GGUF block decoders against candle's, on rows that candle quantized and on blocks of random bytes.
#![allow(clippy::unwrap_used)]

use candle_core::quantized::{GgmlDType, QTensor, ggml_file::qtensor_from_ggml};
use candle_core::{Device, Tensor};
use tailorq_format::gguf::blocks::block_type;
use tailorq_tensor::Rng;

const TYPES: [(GgmlDType, &str); 13] = [
    (GgmlDType::F32, "F32"),
    (GgmlDType::F16, "F16"),
    (GgmlDType::BF16, "BF16"),
    (GgmlDType::Q4_0, "Q4_0"),
    (GgmlDType::Q4_1, "Q4_1"),
    (GgmlDType::Q5_0, "Q5_0"),
    (GgmlDType::Q5_1, "Q5_1"),
    (GgmlDType::Q8_0, "Q8_0"),
    (GgmlDType::Q2K, "Q2_K"),
    (GgmlDType::Q3K, "Q3_K"),
    (GgmlDType::Q4K, "Q4_K"),
    (GgmlDType::Q5K, "Q5_K"),
    (GgmlDType::Q6K, "Q6_K"),
];

const ROWS: usize = 8;
const COLS: usize = 1024;

/// The number of each type in a file.
fn type_id(name: &str) -> u32 {
    match name {
        "F32" => 0,
        "F16" => 1,
        "Q4_0" => 2,
        "Q4_1" => 3,
        "Q5_0" => 6,
        "Q5_1" => 7,
        "Q8_0" => 8,
        "Q2_K" => 10,
        "Q3_K" => 11,
        "Q4_K" => 12,
        "Q5_K" => 13,
        "Q6_K" => 14,
        "BF16" => 30,
        _ => panic!("no type {name}"),
    }
}

fn ours(name: &str, bytes: &[u8]) -> Vec<f32> {
    let t = block_type(type_id(name)).unwrap();
    assert_eq!(t.name, name);
    assert_eq!(bytes.len(), ROWS * COLS / t.weights * t.bytes, "{name}: bytes of a block");
    let mut values = vec![0.0; ROWS * COLS];
    t.decode.unwrap()(bytes, &mut values);
    values
}

fn theirs(tensor: &QTensor) -> Vec<f32> {
    tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_same_bits(name: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len());
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        // NaNs may differ in sign and payload.
        assert!(
            a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
            "{name}: weight {i} is {a:e}, candle has {b:e}"
        );
    }
}

#[test]
fn quantized_rows_decode_to_the_same_bits() {
    let mut rng = Rng::new(1);
    for (dtype, name) in TYPES {
        let values: Vec<f32> = (0..ROWS * COLS).map(|i| rng.normal() * 0.02 * (1 + i / COLS) as f32 + 0.003).collect();
        let source = Tensor::from_vec(values.clone(), (ROWS, COLS), &Device::Cpu).unwrap();
        let tensor = QTensor::quantize(&source, dtype).unwrap();
        let decoded = ours(name, &tensor.data().unwrap());
        assert_same_bits(name, &decoded, &theirs(&tensor));
        // And the values are those that went in, as near as two bits allow.
        let error: f32 = decoded.iter().zip(&values).map(|(a, b)| (a - b).powi(2)).sum();
        let power: f32 = values.iter().map(|v| v.powi(2)).sum();
        assert!(error < 0.15 * power, "{name}: relative error {}", error / power);
    }
}

#[test]
fn random_blocks_decode_to_the_same_bits() {
    let mut rng = Rng::new(2);
    for (dtype, name) in TYPES {
        let t = block_type(type_id(name)).unwrap();
        for _ in 0..8 {
            let n = ROWS * COLS / t.weights * t.bytes;
            let bytes: Vec<u8> = (0..n).map(|_| rng.next_u64() as u8).collect();
            let tensor = qtensor_from_ggml(dtype, &bytes, vec![ROWS, COLS], &Device::Cpu).unwrap();
            assert_same_bits(name, &ours(name, &bytes), &theirs(&tensor));
        }
    }
}
