//! Items through the model: several at once, shared parts first, then all that differs.

use super::rows::{Asked, Place, Rows};
use super::{Likelihood, PreparedItem};
use crate::cache::{Finished, exact, read_exact};
use crate::error::EvalError;
use crate::scored::tokens_at_once;
use crate::task::{Progress, Subject};
use serde_json::{Map, Value};
use std::ops::Range;
use tailorq_model::{Batch, KvCache, Workspace};
use tailorq_runtime::{PREFIX_CHUNK, awake_on};

/// New tokens that the CPU puts through the model together, unless a single item has more. They are read in several steps,
/// and each unpacks all weights: with 512 tokens that took nearly half of the time of short items.
const GROUP_TOKENS: usize = 4096;
/// Bytes of keys and values that a group may hold, unless a single item holds more.
const GROUP_BYTES: usize = 1 << 30;

/// The likelihoods of all requests of all items, in their order; those of `finished` items are not computed again.
/// `progress` hears of items that are done.
///
/// Items are read in the lexical order of their tokens, so that those with the same long beginning are neighbours; the
/// groups depend on the items alone, not on the number of threads nor on what is finished, and a group is computed whole
/// or not at all. So an item has the same bits in every run.
pub(crate) fn score_items(
    subject: &Subject<'_>,
    items: &[PreparedItem],
    finished: &mut Finished,
    progress: &mut Progress<'_>,
) -> Result<Vec<Vec<Likelihood>>, EvalError> {
    let groups = plan(subject, items);
    let mut scores: Vec<Vec<Likelihood>> = vec![Vec::new(); items.len()];
    let mut donor = Donor::default();
    let mut reader = Reader { subject, workspace: Workspace::new() };
    let mut done = 0;
    for (g, group) in groups.iter().enumerate() {
        crate::perplexity::report(progress, done, items.len())?;
        done += group.members.len();
        if group.members.iter().all(|member| finished.has(member.index)) {
            for Member { index, item, .. } in &group.members {
                let known = finished.get(*index, |kept| read_likelihoods(kept, item.branches.len()))?;
                scores[*index] = known.unwrap_or_default();
            }
            continue;
        }
        let (cache, likelihoods) = awake_on(subject.device, || {
            let given = donor.before(&mut reader, &groups, g);
            score_group(&mut reader, &group.members, &given)
        })?;
        donor = Donor { after: Some(g), cache };
        donor.cache.truncate(group.leaves);
        for (member, likelihoods) in group.members.iter().zip(likelihoods) {
            finished.keep(member.index, write_likelihoods(&likelihoods))?;
            scores[member.index] = likelihoods;
        }
    }
    crate::perplexity::report(progress, items.len(), items.len())?;
    Ok(scores)
}

/// The model, with buffers that one pass leaves to the next: fresh ones would be cleared by the system every time.
struct Reader<'a> {
    subject: &'a Subject<'a>,
    workspace: Workspace,
}

impl Reader<'_> {
    /// Reads the pieces, each after what its cache holds.
    fn read(&mut self, batch: &Batch, caches: &mut [KvCache]) -> Hidden<'_> {
        let Subject { model, device, .. } = *self.subject;
        let rows = model.read(device, &batch.ids, &batch.spans, caches, &mut self.workspace);
        Hidden { rows, width: model.config.hidden }
    }
}

/// Hidden states of all tokens of a pass.
struct Hidden<'a> {
    rows: &'a [f32],
    width: usize,
}

impl Hidden<'_> {
    fn row(&self, row: usize) -> &[f32] {
        &self.rows[row * self.width..(row + 1) * self.width]
    }
}

/// Items that are computed together.
struct Group<'a> {
    members: Vec<Member<'a>>,
    /// Tokens of the last member whose keys and values the next group takes from.
    leaves: usize,
}

/// All groups, in the order in which they are computed.
fn plan<'a>(subject: &Subject<'_>, items: &'a [PreparedItem]) -> Vec<Group<'a>> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by(|&a, &b| items[a].shared.cmp(&items[b].shared).then(a.cmp(&b)));
    let (mut groups, mut planned, mut given): (Vec<Group<'a>>, usize, &[u32]) = (Vec::new(), 0, &[]);
    while planned < order.len() {
        let kept = next_group(subject, items, &order[planned..], given);
        let members: Vec<Member<'a>> = (order[planned..].iter().zip(kept))
            .map(|(&index, kept)| Member { index, item: &items[index], kept })
            .collect();
        planned += members.len();
        let last = &items[order[planned - 1]].shared;
        let leaves = order.get(planned).map_or(0, |&next| reusable(last, &items[next]));
        given = &last[..leaves];
        groups.push(Group { members, leaves });
    }
    groups
}

/// Keys and values of tokens that were read for an earlier group.
#[derive(Default)]
struct Donor {
    /// The group that left them.
    after: Option<usize>,
    cache: KvCache,
}

impl Donor {
    /// What the group `g` is given by the one before. If that was not computed, because it was finished already, the
    /// tokens are read as they were then: with the group in which they were read first.
    fn before(&self, reader: &mut Reader<'_>, groups: &[Group<'_>], g: usize) -> KvCache {
        let needed = groups[g].members.iter().map(|member| member.kept).max().unwrap_or(0);
        if needed == 0 {
            return KvCache::new();
        }
        let mut first = g - 1;
        // A group whose last member took all that is needed from the one before only passed it on.
        while self.after != Some(first) && groups[first].members.last().is_some_and(|last| needed <= last.kept) {
            first -= 1;
        }
        let mut cache = if self.after == Some(first) {
            self.cache.clone()
        } else {
            let given = self.before(reader, groups, first);
            let caches = read_shared(reader, &groups[first].members, &given, &mut Rows::default());
            caches.into_iter().next_back().unwrap_or_default()
        };
        cache.truncate(groups[first].leaves);
        cache
    }
}

/// What is kept of a finished item.
fn write_likelihoods(likelihoods: &[Likelihood]) -> Map<String, Value> {
    let sums: Vec<Value> = likelihoods.iter().map(|l| exact(l.sum)).collect();
    let greedy: Vec<bool> = likelihoods.iter().map(|l| l.is_greedy).collect();
    [("loglikelihoods".to_owned(), sums.into()), ("is_greedy".to_owned(), greedy.into())].into_iter().collect()
}

fn read_likelihoods(kept: &Map<String, Value>, n: usize) -> Option<Vec<Likelihood>> {
    let (sums, greedy) = (kept.get("loglikelihoods")?.as_array()?, kept.get("is_greedy")?.as_array()?);
    let pairs = sums.iter().zip(greedy);
    let likelihoods: Option<Vec<Likelihood>> =
        pairs.map(|(sum, greedy)| Some(Likelihood { sum: read_exact(sum)?, is_greedy: greedy.as_bool()? })).collect();
    likelihoods.filter(|l| l.len() == n && sums.len() == n && greedy.len() == n)
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

/// How many tokens each item of the next group takes from those that are `given`. A group ends before an item that has more to take
/// from its neighbour than from the donor.
fn next_group(subject: &Subject<'_>, items: &[PreparedItem], order: &[usize], given: &[u32]) -> Vec<usize> {
    let config = &subject.model.config;
    let token_bytes = 2 * size_of::<f32>() * config.n_blocks * config.n_kv_heads * config.head_dim;
    let most_tokens = tokens_at_once(subject, GROUP_TOKENS);
    let (mut group, mut tokens, mut bytes) = (Vec::new(), 0, 0);
    let mut before: Option<&PreparedItem> = None;
    for item in order.iter().map(|&i| &items[i]) {
        let kept = reusable(given, item);
        tokens += item.n_inputs() - kept;
        bytes += token_bytes * (item.n_inputs() + item.branches.len() * item.shared.len());
        let waits = before.is_some_and(|before| reusable(&before.shared, item) > kept);
        if before.is_some() && (waits || tokens > most_tokens || bytes > GROUP_BYTES) {
            break;
        }
        group.push(kept);
        before = Some(item);
    }
    group
}

/// Scores a group; also the keys and values of the shared part of its last item.
fn score_group(
    reader: &mut Reader<'_>,
    members: &[Member<'_>],
    given: &KvCache,
) -> Result<(KvCache, Vec<Vec<Likelihood>>), EvalError> {
    let mut rows = Rows::default();
    let mut caches = read_shared(reader, members, given, &mut rows);
    let last = caches.last().cloned().unwrap_or_default();
    read_tails(reader, members, &mut caches, &mut rows);
    let asked: Vec<Vec<Vec<Asked>>> =
        (members.iter().enumerate()).map(|(m, member)| ask(member, m, &mut rows)).collect();
    let subject = reader.subject;
    rows.compute(subject);
    let mut scores = Vec::with_capacity(members.len());
    for (member, asked) in members.iter().zip(asked) {
        let likelihoods: Vec<Likelihood> = asked.iter().map(|asked| rows.likelihood(asked)).collect();
        if likelihoods.iter().any(|l| !l.sum.is_finite()) {
            return Err(EvalError::NotFiniteItem { model: subject.name.to_owned(), index: member.index });
        }
        scores.push(likelihoods);
    }
    Ok((last, scores))
}

/// Reads what the donor lacks of the shared parts: a chunk of every item at a time, all cut at the same multiples.
fn read_shared(reader: &mut Reader<'_>, members: &[Member<'_>], donor: &KvCache, rows: &mut Rows) -> Vec<KvCache> {
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
        let hidden = reader.read(&batch, &mut reading);
        for (((m, positions), cache), span) in places.into_iter().zip(reading).zip(&batch.spans) {
            caches[m] = cache;
            let item = members[m].item;
            let needed = item.branches.iter().map(|b| item.first_row(b)).min().unwrap_or(usize::MAX);
            keep(rows, m, None, positions, needed, &hidden, span);
        }
    }
}

/// Reads all tails of all items at once, each after a copy of its item's keys and values.
fn read_tails(reader: &mut Reader<'_>, members: &[Member<'_>], caches: &mut [KvCache], rows: &mut Rows) {
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
    let hidden = reader.read(&batch, &mut reading);
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
    hidden: &Hidden<'_>,
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

#[cfg(test)]
pub(super) mod testing {
    //! Finished items for tests.

    use super::{Finished, Likelihood, write_likelihoods};

    /// As if these had been read from a file.
    pub(crate) fn finished<'a>(known: impl Iterator<Item = (usize, &'a [Likelihood])>) -> Finished {
        Finished::of(known.map(|(index, likelihoods)| (index, write_likelihoods(likelihoods).into())).collect())
    }
}
