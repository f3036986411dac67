//! Worked examples before an item, as lm-evaluation-harness draws them: anew for each item, by one generator a task.

use crate::data::{DataSet, Item, Items};
use crate::error::EvalError;
use crate::mersenne::{FEWSHOT_SEED, PythonRandom};

/// Training items from which examples are drawn.
pub(crate) struct Examples {
    n: usize,
    /// Absent where nothing is drawn.
    pool: Option<Items>,
    random: PythonRandom,
}

impl Examples {
    /// Draws `n` for each item from the training items of a data set, which are only read if there is something to draw.
    pub(crate) fn open(data: &DataSet, n: usize) -> Result<Self, EvalError> {
        let random = PythonRandom::new(FEWSHOT_SEED);
        if n == 0 {
            return Ok(Examples { n, pool: None, random });
        }
        let pool = data.split(&["train", "calib"], "the items from which examples are drawn")?;
        if pool.len() < n {
            let problem = format!("holds {} items, and {n} examples are drawn from them", pool.len());
            return Err(EvalError::Data { path: pool.path().to_owned(), problem });
        }
        Ok(Examples { n, pool: Some(pool), random })
    }

    /// The examples of the next item. Asked once for every item in the order of the file, so that an item's examples
    /// depend on its place alone.
    pub(crate) fn next(&mut self) -> Vec<Item<'_>> {
        let Some(pool) = &self.pool else { return Vec::new() };
        self.random.sample(pool.len(), self.n).into_iter().map(|at| pool.get(at)).collect()
    }
}
