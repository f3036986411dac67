//! Items through the model: several at once, shared parts first, then all that differs.

use super::rows::{Asked, Place, Rows};
use super::{Likelihood, PreparedItem};
use crate::error::EvalError;
use crate::task::{Progress, Subject};
use std::ops::Range;
use tailorq_model::{Batch, KvCache};
use tailorq_runtime::PREFIX_CHUNK;
use tailorq_tensor::Matrix;

/// New tokens that are put through the model together, unless a single item has more.
const GROUP_TOKENS: usize = 512;
/// Bytes of keys and values that a group may hold, unless a single item holds more.
const GROUP_BYTES: usize = 1 << 30;

/// The likelihoods of all requests of all items, in their order. `progress` hears of items that are done.
///
/// Items are read in the lexical order of their tokens, so that those with the same long beginning are neighbours; the
/// groups depend on the items alone, not on the number of threads.
pub(crate) fn score_items(
    subject: &Subject<'_>,
    items: &[PreparedItem],
    progress: &mut Progress<'_>,
) -> Result<Vec<Vec<Likelihood>>, EvalError> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by(|&a, &b| items[a].shared.cmp(&items[b].shared).then(a.cmp(&b)));
    let mut scores: Vec<Vec<Likelihood>> = vec![Vec::new(); items.len()];
    let mut donor = Donor::default();
    let mut done = 0;
    while done < order.len() {
        crate::perplexity::report(progress, done, items.len())?;
        let group = next_group(subject, items, &order[done..], &donor);
        let last = order[done + group.len() - 1];
        let members: Vec<Member<'_>> = (order[done..].iter().zip(&group))
            .map(|(&index, &kept)| Member { index, item: &items[index], kept })
            .collect();
        let next_shares = order.get(done + group.len()).map_or(0, |&next| reusable(&items[last].shared, &items[next]));
        for (member, likelihoods) in members.iter().zip(score_group(subject, &members, &mut donor, next_shares)?) {
            scores[member.index] = likelihoods;
        }
        done += group.len();
    }
    crate::perplexity::report(progress, items.len(), items.len())?;
    Ok(scores)
}

/// Keys and values of tokens that were read for an earlier item.
#[derive(Default)]
struct Donor {
    tokens: Vec<u32>,
    cache: KvCache,
}

/// An item of a group.
struct Member<'a> {
    index: usize,
    item: &'a PreparedItem,
    /// Tokens whose keys and values come from the donor.
    kept: usize,
}

/// Tokens that an item may take from another that begins with `tokens`: whole chunks, which are computed in the same
/// way whichever item they are computed for, and none whose next word is scored.
fn reusable(tokens: &[u32], item: &PreparedItem) -> usize {
    let common = tokens.iter().zip(&item.shared).take_while(|(a, b)| a == b).count();
    let first_scored = item.branches.iter().map(|b| item.first_row(b)).min().unwrap_or(0);
    common.min(first_scored) / PREFIX_CHUNK * PREFIX_CHUNK
}

/// How many tokens each item of the next group takes from the donor. A group ends before an item that has more to take
/// from its neighbour than from the donor.
fn next_group(subject: &Subject<'_>, items: &[PreparedItem], order: &[usize], donor: &Donor) -> Vec<usize> {
    let config = &subject.model.config;
    let token_bytes = 2 * size_of::<f32>() * config.n_blocks * config.n_kv_heads * config.head_dim;
    let (mut group, mut tokens, mut bytes) = (Vec::new(), 0, 0);
    let mut before: Option<&PreparedItem> = None;
    for item in order.iter().map(|&i| &items[i]) {
        let kept = reusable(&donor.tokens, item);
        tokens += item.n_inputs() - kept;
        bytes += token_bytes * (item.n_inputs() + item.branches.len() * item.shared.len());
        let waits = before.is_some_and(|before| reusable(&before.shared, item) > kept);
        if before.is_some() && (waits || tokens > GROUP_TOKENS || bytes > GROUP_BYTES) {
            break;
        }
        group.push(kept);
        before = Some(item);
    }
    group
}

/// Scores a group and leaves the first `next_shares` tokens of its last item as the donor.
fn score_group(
    subject: &Subject<'_>,
    members: &[Member<'_>],
    donor: &mut Donor,
    next_shares: usize,
) -> Result<Vec<Vec<Likelihood>>, EvalError> {
    let mut rows = Rows::default();
    let mut caches = read_shared(subject, members, &donor.cache, &mut rows);
    if let (Some(member), Some(cache)) = (members.last(), caches.last()) {
        let mut cache = cache.clone();
        cache.truncate(next_shares);
        *donor = Donor { tokens: member.item.shared[..next_shares].to_vec(), cache };
    }
    read_tails(subject, members, &mut caches, &mut rows);
    let asked: Vec<Vec<Vec<Asked>>> =
        (members.iter().enumerate()).map(|(m, member)| ask(member, m, &mut rows)).collect();
    rows.compute(subject);
    let mut scores = Vec::with_capacity(members.len());
    for (member, asked) in members.iter().zip(asked) {
        let likelihoods: Vec<Likelihood> = asked.iter().map(|asked| rows.likelihood(asked)).collect();
        if likelihoods.iter().any(|l| !l.sum.is_finite()) {
            return Err(EvalError::NotFiniteItem { model: subject.name.to_owned(), index: member.index });
        }
        scores.push(likelihoods);
    }
    Ok(scores)
}

/// Reads what the donor lacks of the shared parts: a chunk of every item at a time, all cut at the same multiples.
fn read_shared(subject: &Subject<'_>, members: &[Member<'_>], donor: &KvCache, rows: &mut Rows) -> Vec<KvCache> {
    let mut caches: Vec<KvCache> = (members.iter())
        .map(|member| {
            let mut cache = if member.kept == 0 { KvCache::new() } else { donor.clone() };
            cache.truncate(member.kept);
            cache
        })
        .collect();
    loop {
        let (mut pieces, mut reading, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (m, member) in members.iter().enumerate() {
            let shared = &member.item.shared;
            let start = caches[m].len();
            let end = ((start / PREFIX_CHUNK + 1) * PREFIX_CHUNK).min(shared.len());
            if start < end {
                pieces.push(&shared[start..end]);
                reading.push(std::mem::take(&mut caches[m]));
                places.push((m, start..end));
            }
        }
        if pieces.is_empty() {
            return caches;
        }
        let batch = Batch::new(pieces);
        let hidden = subject.model.hidden(subject.device, &batch, Some(&mut reading));
        for (((m, positions), cache), span) in places.into_iter().zip(reading).zip(&batch.spans) {
            caches[m] = cache;
            let item = members[m].item;
            let needed = item.branches.iter().map(|b| item.first_row(b)).min().unwrap_or(usize::MAX);
            keep(rows, m, None, positions, needed, &hidden, span);
        }
    }
}

/// Reads all tails of all items at once, each after a copy of its item's keys and values.
fn read_tails(subject: &Subject<'_>, members: &[Member<'_>], caches: &mut [KvCache], rows: &mut Rows) {
    let (mut pieces, mut reading, mut places) = (Vec::new(), Vec::new(), Vec::new());
    for (m, (member, cache)) in members.iter().zip(caches).enumerate() {
        let n_shared = member.item.shared.len();
        for (b, branch) in member.item.branches.iter().enumerate().filter(|(_, b)| !b.tail.is_empty()) {
            pieces.push(&branch.tail[..]);
            reading.push(cache.clone());
            places.push((m, b, n_shared..n_shared + branch.tail.len()));
        }
        *cache = KvCache::new();
    }
    if pieces.is_empty() {
        return;
    }
    let batch = Batch::new(pieces);
    let hidden = subject.model.hidden(subject.device, &batch, Some(&mut reading));
    for ((m, b, positions), span) in places.into_iter().zip(&batch.spans) {
        let needed = members[m].item.first_row(&members[m].item.branches[b]);
        keep(rows, m, Some(b), positions, needed, &hidden, span);
    }
}

/// Keeps the rows of a span from the position `needed` on.
fn keep(
    rows: &mut Rows,
    item: usize,
    branch: Option<usize>,
    positions: Range<usize>,
    needed: usize,
    hidden: &Matrix,
    span: &Range<usize>,
) {
    for (position, row) in positions.zip(span.clone()).filter(|(position, _)| *position >= needed) {
        rows.push(Place { item, branch, position }, hidden.row(row));
    }
}

/// Asks for every target of every branch.
fn ask(member: &Member<'_>, m: usize, rows: &mut Rows) -> Vec<Vec<Asked>> {
    let item = member.item;
    let n_shared = item.shared.len();
    (item.branches.iter().enumerate())
        .map(|(b, branch)| {
            let positions = item.first_row(branch)..;
            (positions.zip(&branch.targets))
                .map(|(position, &target)| {
                    let branch = (position >= n_shared).then_some(b);
                    rows.ask(Place { item: m, branch, position }, target)
                })
                .collect()
        })
        .collect()
}
