//! Log-likelihoods of continuations after contexts, as lm-evaluation-harness asks for them (`loglikelihood`).
//!
//! All requests of an item are scored together: what they begin with in common is read once, and long beginnings that
//! items share (few-shot examples) once for all of them.

mod encode;
mod engine;
mod rows;

pub(crate) use encode::{PreparedItem, Request, prepare};
pub(crate) use engine::score_items;

/// How likely a continuation is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Likelihood {
    /// Sum of the log-probabilities of its tokens, in nats.
    pub(crate) sum: f64,
    /// Whether each of its tokens is the most likely one (of equals, the one of the lowest id).
    pub(crate) is_greedy: bool,
}

#[cfg(test)]
mod tests {
    //! Encoding rules, and the engine against every request scored alone.

    use super::{Likelihood, PreparedItem, Request, prepare, score_items};
    use crate::cache::Finished;
    use crate::error::EvalError;
    use crate::likelihood::encode::{Encoded, encode};
    use crate::task::Subject;
    use std::ops::ControlFlow;
    use std::sync::Arc;
    use tailorq_model::testing::TinyModel;
    use tailorq_model::{Batch, OpenedModel};
    use tailorq_runtime::Device;

    const BOS: u32 = 256;

    struct Fixture {
        opened: OpenedModel,
        device: Arc<dyn Device>,
    }

    impl Fixture {
        /// A model whose tokens are bytes; `adds_bos` makes its tokenizer begin every text with BOS.
        fn new(max_positions: usize, adds_bos: bool) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let mut tiny = TinyModel::new("qwen2", 5).unwrap();
            tiny.config.max_positions = max_positions;
            tiny.write_directory(dir.path()).unwrap();
            if adds_bos {
                let path = dir.path().join("tokenizer.json");
                let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
                json["post_processor"] = serde_json::json!({
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [BOS], "tokens": ["<|endoftext|>"]}}
                });
                std::fs::write(&path, json.to_string()).unwrap();
            }
            let opened = tailorq_model::open(dir.path().to_str().unwrap()).unwrap();
            Fixture { opened, device: tailorq_kernels::cpu() }
        }

        fn subject(&self) -> Subject<'_> {
            let OpenedModel { model, tokenizer, template, .. } = &self.opened;
            Subject {
                name: "tiny",
                model,
                tokenizer,
                template: template.as_ref(),
                device: self.device.as_ref(),
                decoders: None,
            }
        }

        fn bytes(&self, text: &str) -> Vec<u32> {
            self.opened.tokenizer.encode(text, false).unwrap()
        }

        fn encode(&self, context: &str, continuation: &str) -> Encoded {
            encode(&self.subject(), &request(context, continuation)).unwrap()
        }

        fn prepare(&self, requests: &[Request]) -> PreparedItem {
            prepare(&self.subject(), "arc_easy", 0, requests).unwrap()
        }

        fn score(&self, items: &[PreparedItem]) -> Vec<Vec<Likelihood>> {
            self.score_rest(items, &mut Finished::nothing())
        }

        fn score_rest(&self, items: &[PreparedItem], finished: &mut Finished) -> Vec<Vec<Likelihood>> {
            score_items(&self.subject(), items, finished, &mut |_, _| ControlFlow::Continue(())).unwrap()
        }

        /// A request alone: all of it at once, without keys and values of anything else, in plain arithmetic.
        fn alone(&self, item: &PreparedItem, branch: usize) -> Likelihood {
            let branch = &item.branches[branch];
            let input = [&item.shared[..], &branch.tail].concat();
            let model = &self.opened.model;
            let logits = model
                .logits(self.device.as_ref(), &model.hidden(self.device.as_ref(), &Batch::new([&input[..]]), None));
            let first = input.len() - branch.targets.len();
            let mut likelihood = Likelihood { sum: 0.0, is_greedy: true };
            for (row, &target) in (first..).zip(&branch.targets) {
                let logits: Vec<f64> = logits.row(row).iter().map(|l| f64::from(*l)).collect();
                likelihood.sum += logits[target as usize] - logits.iter().map(|l| l.exp()).sum::<f64>().ln();
                likelihood.is_greedy &= logits.iter().all(|l| *l <= logits[target as usize]);
            }
            likelihood
        }
    }

    fn request(context: &str, continuation: &str) -> Request {
        Request { context: context.to_owned(), continuation: continuation.to_owned() }
    }

    fn requests(context: &str, continuations: &[&str]) -> Vec<Request> {
        continuations.iter().map(|c| request(context, c)).collect()
    }

    #[test]
    fn white_space_moves_to_the_continuation() {
        let tiny = Fixture::new(256, false);
        let encoded = tiny.encode("Why? \n", " so");
        assert_eq!((encoded.context, encoded.continuation), (tiny.bytes("Why?"), tiny.bytes(" \n so")));
        let encoded = tiny.encode("Why?", " so");
        assert_eq!((encoded.context, encoded.continuation), (tiny.bytes("Why?"), tiny.bytes(" so")));
    }

    #[test]
    fn nothing_before_is_the_prefix_token() {
        let tiny = Fixture::new(256, false);
        let encoded = tiny.encode("", "so");
        assert_eq!((encoded.context, encoded.continuation), (vec![BOS], tiny.bytes("so")));
        let encoded = tiny.encode("", "<|endoftext|>so");
        assert_eq!((encoded.context, encoded.continuation), (vec![BOS], tiny.bytes("so")), "not twice");
        let encoded = tiny.encode(" ", "so");
        assert_eq!((encoded.context, encoded.continuation), (vec![BOS], tiny.bytes(" so")));
    }

    #[test]
    fn the_tokenizers_own_bos_comes_once() {
        let tiny = Fixture::new(256, true);
        let with_bos = [&[BOS], &tiny.bytes("Why?")[..]].concat();
        let encoded = tiny.encode("Why?", " so");
        assert_eq!((encoded.context, encoded.continuation), (with_bos.clone(), tiny.bytes(" so")));
        let encoded = tiny.encode("<|endoftext|>Why?", " so");
        assert_eq!((encoded.context, encoded.continuation), (with_bos, tiny.bytes(" so")));
        let encoded = tiny.encode("", "so");
        assert_eq!((encoded.context, encoded.continuation), (vec![BOS], tiny.bytes("so")));
    }

    #[test]
    fn long_requests_lose_their_beginning() {
        let tiny = Fixture::new(8, false);
        let item = tiny.prepare(&requests("abcdefgh", &["i", "jk"]));
        // Nine tokens are kept, of which the last is only predicted.
        let input = |b: usize| [&item.shared[..], &item.branches[b].tail].concat();
        assert_eq!((input(0), &item.branches[0].targets), (tiny.bytes("abcdefgh"), &tiny.bytes("i")));
        assert_eq!((input(1), &item.branches[1].targets), (tiny.bytes("bcdefghj"), &tiny.bytes("jk")));
        assert_eq!(item.shortened, 1);
        assert!((tiny.score(std::slice::from_ref(&item))[0][1].sum - tiny.alone(&item, 1).sum).abs() < 1e-4);
        let error =
            |continuation: &str| prepare(&tiny.subject(), "arc_easy", 7, &requests("a", &[continuation])).unwrap_err();
        assert!(matches!(error("bcdefghij"), EvalError::Unscorable { index: 7, tokens: 9, limit: 8, .. }));
        assert!(matches!(error(""), EvalError::Unscorable { tokens: 0, .. }));
    }

    /// Items of every kind: short and long, with long common beginnings, one token or many, two contexts, equal choices.
    fn mixed_items(tiny: &Fixture) -> Vec<PreparedItem> {
        let block = "Question: what is it?\nAnswer: a thing\n\n".repeat(9);
        let mut items = vec![
            tiny.prepare(&requests("Short:", &[" a", " b", " a"])),
            tiny.prepare(&requests("Q", &[" some longer words", " some other words, longer still", " no"])),
            tiny.prepare(&[request("It was the dog", " that barked."), request("It was the cat", " that barked.")]),
            tiny.prepare(&requests("", &["x", "yz"])),
        ];
        for i in 0..6 {
            let context = format!("{block}Question: {}?\nAnswer:", "why ".repeat(1 + 11 * i));
            items.push(tiny.prepare(&requests(&context, &["A", "B", "C", "D"])));
            items.push(tiny.prepare(&requests(&format!("{context} {i}"), &[" yes, it is", " no", " perhaps so"])));
        }
        // The context of this one ends within the part that others share: what it scores must be read again.
        items.push(tiny.prepare(&requests(&block[..130], &[&block[130..300]])));
        items
    }

    #[test]
    fn requests_score_as_they_do_alone() {
        let tiny = Fixture::new(2048, false);
        let items = mixed_items(&tiny);
        let scores = tiny.score(&items);
        for (i, (item, scores)) in items.iter().zip(&scores).enumerate() {
            assert_eq!(item.branches.len(), scores.len());
            for (b, score) in scores.iter().enumerate() {
                let alone = tiny.alone(item, b);
                assert!(
                    (score.sum - alone.sum).abs() < 1e-4,
                    "item {i}, choice {b}: {} alone {}",
                    score.sum,
                    alone.sum
                );
                assert_eq!(score.is_greedy, alone.is_greedy, "item {i}, choice {b}");
            }
        }
        assert_eq!(scores[0][0], scores[0][2], "equal choices");
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let tiny = Fixture::new(2048, false);
        let items = mixed_items(&tiny);
        let with = |n: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            let bits = |l: &Likelihood| (l.sum.to_bits(), l.is_greedy);
            pool.install(|| tiny.score(&items)).iter().flatten().map(bits).collect::<Vec<_>>()
        };
        assert_eq!(with(1), with(3));
    }

    #[test]
    fn finished_items_change_no_bit_of_the_others() {
        let tiny = Fixture::new(2048, false);
        let items = mixed_items(&tiny);
        let whole = tiny.score(&items);
        for missing in 0..items.len() {
            // All but one are finished, then the first ones, then the last ones.
            let patterns: [&dyn Fn(usize) -> bool; 3] = [&|i| i != missing, &|i| i < missing, &|i| i > missing];
            for is_finished in patterns {
                let known = (0..items.len()).filter(|i| is_finished(*i)).map(|i| (i, &whole[i][..]));
                let mut finished = super::engine::testing::finished(known);
                assert_eq!(tiny.score_rest(&items, &mut finished), whole, "around item {missing}");
            }
        }
    }

    #[test]
    fn greedy_continuations_are_known() {
        let tiny = Fixture::new(256, false);
        let context = tiny.bytes("Once");
        let model = &tiny.opened.model;
        let mut ids = context.clone();
        for _ in 0..3 {
            let logits =
                model.logits(tiny.device.as_ref(), &model.hidden(tiny.device.as_ref(), &Batch::new([&ids[..]]), None));
            let last = logits.row(logits.rows() - 1);
            let best = (0..last.len()).fold(0, |best, i| if last[i] > last[best] { i } else { best });
            ids.push(best as u32);
        }
        let branch = |targets: Vec<u32>| crate::likelihood::encode::Branch {
            tail: targets[..targets.len() - 1].to_vec(),
            targets,
        };
        let greedy = ids[context.len()..].to_vec();
        let mut other = greedy.clone();
        other[1] ^= 1;
        let item = PreparedItem { shared: context, branches: vec![branch(greedy), branch(other)], shortened: 0 };
        let scores = tiny.score(&[item]);
        assert_eq!([scores[0][0].is_greedy, scores[0][1].is_greedy], [true, false]);
    }

    #[test]
    fn damage_and_interruption_are_told() {
        let mut tiny = Fixture::new(256, false);
        let item = tiny.prepare(&requests("Short:", &[" a"]));
        let finished = &mut Finished::nothing();
        let items = std::slice::from_ref(&item);
        let stopped = score_items(&tiny.subject(), items, finished, &mut |_, _| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(EvalError::Interrupted)));
        tiny.opened.model.norm[0] = f32::NAN;
        let damaged = score_items(&tiny.subject(), items, finished, &mut |_, _| ControlFlow::Continue(()));
        assert!(matches!(damaged, Err(EvalError::NotFiniteItem { index: 0, .. })), "{damaged:?}");
    }
}
