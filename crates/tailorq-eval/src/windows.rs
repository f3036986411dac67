//! A long text as windows of tokens.

use crate::error::EvalError;

/// How a text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowOptions {
    /// Tokens of a window; at least 2.
    pub window: usize,
    /// Score only the first so many windows.
    pub windows: Option<usize>,
}

impl Default for WindowOptions {
    /// Windows of 2048, all of them: what papers on quantization report.
    fn default() -> Self {
        WindowOptions { window: 2048, windows: None }
    }
}

impl WindowOptions {
    /// Consecutive windows without overlap. What is left after the last whole window is dropped, unless there is no whole
    /// window: then all of it is one shorter window.
    pub(crate) fn cut<'a>(&self, tokens: &'a [u32]) -> Result<Vec<&'a [u32]>, EvalError> {
        if self.window < 2 {
            let remedy = "use at least 2 tokens (the first of a window is never scored)".to_owned();
            return Err(EvalError::BadOption { option: "window", value: self.window, remedy });
        }
        if self.windows == Some(0) {
            return Err(EvalError::BadOption { option: "windows", value: 0, remedy: "use at least 1".to_owned() });
        }
        if tokens.len() < 2 {
            return Err(EvalError::TextTooShort { tokens: tokens.len() });
        }
        let limit = self.windows.unwrap_or(usize::MAX);
        let windows: Vec<&[u32]> = tokens.chunks_exact(self.window).take(limit).collect();
        Ok(if windows.is_empty() { vec![tokens] } else { windows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(tokens: &[u32], window: usize, windows: Option<usize>) -> Result<Vec<&[u32]>, EvalError> {
        WindowOptions { window, windows }.cut(tokens)
    }

    #[test]
    fn whole_windows_in_order_and_the_rest_dropped() {
        let tokens: Vec<u32> = (0..10).collect();
        assert_eq!(cut(&tokens, 4, None).unwrap(), [&[0, 1, 2, 3][..], &[4, 5, 6, 7]]);
        assert_eq!(cut(&tokens, 4, Some(1)).unwrap(), [&[0, 1, 2, 3]]);
        assert_eq!(cut(&tokens, 5, Some(9)).unwrap().len(), 2);
    }

    #[test]
    fn a_short_text_is_one_window_and_a_shorter_one_an_error() {
        assert_eq!(cut(&[1, 2, 3], 4, None).unwrap(), [&[1, 2, 3]]);
        for tokens in [&[][..], &[1]] {
            assert!(matches!(cut(tokens, 4, None), Err(EvalError::TextTooShort { .. })));
        }
    }

    #[test]
    fn windows_without_targets_are_refused() {
        for (window, windows) in [(0, None), (1, None), (4, Some(0))] {
            assert!(matches!(cut(&[1, 2, 3], window, windows), Err(EvalError::BadOption { .. })));
        }
    }
}
