//! The text task of `gpusq demo`: short reviews, generated from a seed without any file or network.
//!
//! The label says whether the review speaks well of what the writer had. Single words do not tell:
//! negation turns an adjective round ("nobody found the soup awful"), a sentence around the clause may
//! turn it round again ("i doubt that ..."), of two contrasted clauses only one decides ("although A, B",
//! "B, even though A"), a comparison depends on who comes first ("their guide was better than our guide"),
//! and asides carry negations and adjectives that do not count ("after a dreadful journey, ..."). The
//! rules are exact, so there is no label noise and a model that has learned them scores 100 %.

use std::collections::{BTreeSet, HashSet};

/// Names of the two classes, indexed by label.
pub const LABELS: [&str; 2] = ["negative", "positive"];

/// Special tokens at the head of [`SyntheticText::vocab`], in the order of BERT's own `vocab.txt`.
const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// A labelled text set with its vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyntheticText {
    /// Sentences to train on with their label (index into [`LABELS`]); as many of one class as of the
    /// other, give or take one.
    pub train: Vec<(String, u32)>,
    /// Sentences to evaluate on, balanced likewise; none of them is in `train`.
    pub dev: Vec<(String, u32)>,
    /// Lines of a lower-casing WordPiece `vocab.txt`: the special tokens, then every word and punctuation
    /// mark the grammar can produce, in alphabetical order. Does not depend on the seed.
    pub vocab: Vec<String>,
}

/// Generates `train` + `dev` different sentences of 8 to 28 words.
///
/// The same arguments give the same text on every machine. The grammar holds far more than 10^9
/// sentences; asking for more than it has would not end.
pub fn generate(seed: u64, train: usize, dev: usize) -> SyntheticText {
    let mut random = Random { seed, counter: 0 };
    let mut seen = HashSet::new();
    let mut split = |size: usize| {
        let mut labels: Vec<u32> = (0..size).map(|i| (i % 2) as u32).collect();
        for i in (1..size).rev() {
            labels.swap(i, random.below(i + 1));
        }
        let mut fresh = |label| loop {
            let text = sentence(label == 1, &mut random);
            let words = text.split(' ').count();
            if (8..=28).contains(&words) && seen.insert(text.clone()) {
                break (text, label);
            }
        };
        labels.into_iter().map(&mut fresh).collect()
    };
    SyntheticText { train: split(train), dev: split(dev), vocab: vocab() }
}

/// Adjectives by polarity: `ADJECTIVES[1]` praises.
const ADJECTIVES: [&[&str]; 2] = [
    &["awful", "bad", "boring", "dreadful", "dull", "horrible", "nasty", "poor", "terrible", "ugly"],
    &[
        "brilliant",
        "charming",
        "excellent",
        "fine",
        "good",
        "great",
        "lovely",
        "pleasant",
        "superb",
        "wonderful",
    ],
];
const OPINIONS: [&[&str]; 2] =
    [&["criticised", "disliked", "hated", "regretted"], &["admired", "enjoyed", "loved", "praised"]];
const DEGREES: &[&str] = &["very", "really", "quite", "truly", "rather", "especially"];
const OWNERS: &[&str] = &["the", "the", "the", "this", "her", "my"];
const THINGS: &[&str] = &[
    "band",
    "beach",
    "book",
    "bread",
    "breakfast",
    "cake",
    "coffee",
    "concert",
    "cook",
    "dessert",
    "dinner",
    "film",
    "garden",
    "guide",
    "hotel",
    "lesson",
    "menu",
    "museum",
    "music",
    "play",
    "room",
    "service",
    "singer",
    "soup",
    "story",
    "teacher",
    "tour",
    "trip",
    "view",
    "waiter",
    "wine",
    "lecture",
];
const PLACES: &[&str] =
    &["by the lake", "near the station", "in the old town", "at the harbour", "from last week"];
/// What an aside calls good or bad; never the subject of a clause.
const OCCASIONS: &[&str] =
    &["morning", "afternoon", "evening", "week", "journey", "meeting", "walk", "flight"];
const PLANS: &[&str] =
    &["book early", "bring an umbrella", "wait outside", "drive there", "call ahead", "stay long"];
/// Openings that leave a clause as it is, and ones that turn it round.
const FRAMES: [&[&str]; 2] = [
    &[
        "it is false that",
        "it is not true that",
        "i do not believe that",
        "my sister doubts that",
        "nobody would say that",
        "our friends deny that",
    ],
    &[
        "it is clear that",
        "it is true that",
        "i do believe that",
        "my sister thinks that",
        "everybody would say that",
        "our friends agree that",
    ],
];
const COMPARATIVES: [&[&str]; 2] =
    [&["worse", "duller", "poorer", "weaker"], &["better", "finer", "nicer", "stronger"]];
const MARGINS: &[&str] = &["much", "far", "clearly", "a little", "a lot"];
const CONTESTS: [&[&str]; 2] = [&["lost to", "trailed", "fell behind"], &["beat", "outplayed", "defeated"]];
const TEAMS: &[&str] = &["team", "choir", "band", "crew", "class", "club"];
const TAILS: &[&str] =
    &["in the end", "on that day", "last summer", "once again", "as far as i know", "from start to finish"];

/// Words of the fixed parts of the grammar, beside the lists above.
const GRAMMAR: &str = "after although because before but did even everyone found never nobody not \
    on our seem seemed still than that their though was we when yet , . ;";

fn vocab() -> Vec<String> {
    let lists = [OWNERS, THINGS, PLACES, DEGREES, OCCASIONS, PLANS, MARGINS, TEAMS, TAILS];
    let paired = [ADJECTIVES, OPINIONS, FRAMES, COMPARATIVES, CONTESTS].into_iter().flatten();
    let phrases = lists.into_iter().chain(paired).flatten().copied();
    let words: BTreeSet<&str> = phrases.chain([GRAMMAR]).flat_map(str::split_whitespace).collect();
    SPECIAL.into_iter().chain(words).map(str::to_owned).collect()
}

/// A review with the given verdict.
fn sentence(positive: bool, random: &mut Random) -> String {
    let body = match random.below(20) {
        0..8 => framed(positive, random),
        8..15 => return contrast(positive, random) + ".",
        _ => comparison(positive, random),
    };
    match random.below(6) {
        0 => format!("{}, {body}.", aside(random)),
        1 => format!("{body} {}.", aside(random)),
        _ => body + ".",
    }
}

/// One clause, perhaps inside a sentence that affirms or denies it.
fn framed(positive: bool, random: &mut Random) -> String {
    if random.chance(70) {
        return clause(positive, true, random);
    }
    let affirm = random.chance(60);
    format!("{} {}", random.pick(FRAMES[affirm as usize]), clause(positive == affirm, true, random))
}

/// Two clauses of which the construction lets one decide; the other says the opposite or nothing.
fn contrast(positive: bool, random: &mut Random) -> String {
    let decides = clause(positive, false, random);
    let yields = match random.chance(65) {
        true => clause(!positive, false, random),
        false => format!("{} {} was {}", random.pick(OWNERS), random.pick(THINGS), random.pick(PLACES)),
    };
    match random.below(5) {
        0 => format!("{yields}, but {decides}"),
        1 => format!("{yields}, yet {decides}"),
        2 => format!("{yields}; still, {decides}"),
        3 => format!("although {yields}, {decides}"),
        _ => format!("{decides}, even though {yields}"),
    }
}

/// Ours against theirs; the words are the same whichever way round it is.
fn comparison(positive: bool, random: &mut Random) -> String {
    // Ours comes first somewhat more often than not, which lets a model see the comparatives' meaning
    // before it has learned that the order matters.
    let ours_first = random.chance(62);
    let (first, second) = if ours_first { ("our", "their") } else { ("their", "our") };
    let first_wins = (positive == ours_first) as usize;
    let tail = random.pick(TAILS);
    if random.chance(60) {
        let (thing, margin) = (random.pick(THINGS), random.pick(MARGINS));
        let comparative = random.pick(COMPARATIVES[first_wins]);
        format!("{first} {thing} was {margin} {comparative} than {second} {thing} {tail}")
    } else {
        let (team, contest) = (random.pick(TEAMS), random.pick(CONTESTS[first_wins]));
        let place = random.pick(PLACES);
        format!("{first} {team} {contest} {second} {team} {place} {tail}")
    }
}

/// A statement about one thing that speaks well of it or not, by an adjective or verb of that polarity or
/// by a negated one of the other.
fn clause(positive: bool, long: bool, random: &mut Random) -> String {
    // Less often than not, so that the adjectives' meaning can be learned first.
    let negated = random.chance(if long { 20 } else { 14 });
    let polarity = (positive != negated) as usize;
    let owner = random.pick(OWNERS);
    let mut thing = format!("{owner} {}", random.pick(THINGS));
    if long || random.chance(30) {
        thing = format!("{thing} {}", random.pick(PLACES));
    }
    let degree = if random.chance(50) { format!("{} ", random.pick(DEGREES)) } else { String::new() };
    let adjective = random.pick(ADJECTIVES[polarity]);
    let opinion = random.pick(OPINIONS[polarity]);
    match (random.below(5), negated) {
        (0 | 1, false) => format!("{thing} was {degree}{adjective}"),
        (0, true) => format!("{thing} was not {degree}{adjective}"),
        (1, true) => format!("{thing} was never {degree}{adjective}"),
        (2, false) => format!("{thing} seemed {degree}{adjective}"),
        (2, true) => format!("{thing} did not seem {degree}{adjective}"),
        (3, false) => format!("everyone found {thing} {degree}{adjective}"),
        (3, true) => format!("nobody found {thing} {degree}{adjective}"),
        (_, false) => format!("everyone {opinion} {thing}"),
        (_, true) => format!("nobody {opinion} {thing}"),
    }
}

/// An adverbial that holds an adjective or a negation and says nothing about the verdict.
fn aside(random: &mut Random) -> String {
    if random.chance(35) {
        let polarity = random.below(2);
        let (preposition, adjective) =
            (random.pick(&["on", "after", "before"]), random.pick(ADJECTIVES[polarity]));
        format!("{preposition} that {adjective} {}", random.pick(OCCASIONS))
    } else {
        let opening = random.pick(&["because", "when"]);
        let not = if random.chance(60) { "not " } else { "" };
        format!("{opening} we did {not}{}", random.pick(PLANS))
    }
}

/// A counter-based generator: draw `n` is a mix of seed and `n` (SplitMix64, Steele et al. 2014), so the
/// text depends on nothing but the seed.
struct Random {
    seed: u64,
    counter: u64,
}

impl Random {
    fn next(&mut self) -> u64 {
        self.counter += 1;
        mix(mix(self.seed).wrapping_add(self.counter.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
    }

    /// A number below `n`, by the high bits (multiply and shift).
    fn below(&mut self, n: usize) -> usize {
        ((self.next() as u128 * n as u128) >> 64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick(&mut self, from: &[&'static str]) -> &'static str {
        from[self.below(from.len())]
    }
}

/// The finaliser of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use super::*;

    fn words(text: &str) -> Vec<&str> {
        let marks = |c| matches!(c, ',' | '.' | ';');
        text.split(' ')
            .flat_map(|w| match w.find(marks) {
                Some(at) => vec![&w[..at], &w[at..]],
                None => vec![w],
            })
            .collect()
    }

    #[test]
    fn the_seed_decides_everything() {
        assert_eq!(generate(7, 300, 50), generate(7, 300, 50));
        assert_ne!(generate(7, 300, 50).train, generate(8, 300, 50).train);
        assert_eq!(generate(7, 3, 5).vocab, generate(8, 3, 5).vocab);
        // The text is part of what the demo's figures mean: a change of the grammar should be noticed.
        assert_eq!(generate(0, 1, 0).train[0].0, "our team lost to their team by the lake in the end.");
    }

    #[test]
    fn classes_are_balanced_and_no_sentence_comes_twice() {
        let text = generate(1, 4001, 1000);
        for (split, size) in [(&text.train, 4001), (&text.dev, 1000)] {
            assert_eq!(split.len(), size);
            assert_eq!(split.iter().filter(|(_, label)| *label == 1).count(), size / 2);
            assert_eq!(split.iter().filter(|(_, label)| *label == 0).count(), size.div_ceil(2));
        }
        let all: HashSet<&str> = text.train.iter().chain(&text.dev).map(|(text, _)| text.as_str()).collect();
        assert_eq!(all.len(), 5001);
        // Both classes come in any order, not one after the other.
        let runs = text.dev.windows(2).filter(|w| w[0].1 != w[1].1).count();
        assert!((400..600).contains(&runs), "{runs} changes of label");
    }

    #[test]
    fn the_vocabulary_is_exactly_what_sentences_use() {
        let text = generate(2, 6000, 0);
        assert_eq!(text.vocab[..5], SPECIAL);
        let vocab: HashSet<&str> = text.vocab.iter().map(String::as_str).collect();
        assert_eq!(vocab.len(), text.vocab.len(), "a word stands twice");
        assert!((100..=400).contains(&vocab.len()), "{} words", vocab.len());
        let mut used: HashSet<&str> = SPECIAL.into();
        for (sentence, _) in &text.train {
            let length = sentence.split(' ').count();
            assert!((8..=28).contains(&length), "{length} words: {sentence}");
            used.extend(words(sentence));
        }
        assert_eq!(used.difference(&vocab).collect::<Vec<_>>(), [&""; 0]);
        assert_eq!(vocab.difference(&used).collect::<Vec<_>>(), [&""; 0]);
    }

    /// Each rule of the grammar on a sentence whose verdict a reader can check.
    #[test]
    fn verdicts_follow_from_the_words() {
        let text = generate(3, 20_000, 0);
        let adjective = |w: &str| ADJECTIVES.iter().position(|list| list.contains(&w));
        let mut checked = [0; 3];
        for (sentence, label) in &text.train {
            let words = words(sentence);
            let plain = !sentence.contains(" that ");
            // A single clause that ends with an adjective, with nothing around it.
            let single = plain && !words.contains(&",") && !words.contains(&";");
            if let Some(polarity) = adjective(words[words.len() - 2]).filter(|_| single) {
                let negated = ["not", "never", "nobody"].iter().any(|n| words.contains(n));
                assert_eq!(*label, (polarity == 1) as u32 ^ negated as u32, "{sentence}");
                checked[0] += 1;
            }
            // Of "A, but [it] was adjective." the end decides.
            if let Some((_, end)) = sentence.split_once(", but ") {
                let end = self::words(end);
                if let Some(polarity) = adjective(end[end.len() - 2]).filter(|_| plain) {
                    let negated = ["not", "never", "nobody"].iter().any(|n| end.contains(n));
                    assert_eq!(*label, (polarity == 1) as u32 ^ negated as u32, "{sentence}");
                    checked[1] += 1;
                }
            }
            if sentence.starts_with("their ") {
                let better = ["better", "finer", "nicer", "stronger", "beat", "outplayed", "defeated"];
                assert_eq!(*label == 0, better.iter().any(|b| words.contains(b)), "{sentence}");
                checked[2] += 1;
            }
        }
        assert!(checked.iter().all(|&n| n > 100), "{checked:?}");
    }

    /// Accuracy on `dev` of a logistic regression over counts of `features`, trained by SGD.
    fn linear_model<'a>(text: &'a SyntheticText, features: impl Fn(&[&'a str]) -> Vec<String>) -> f64 {
        let mut ids = BTreeMap::new();
        let mut encode = |(sentence, label): &'a (String, u32)| {
            let count = |feature| {
                let next = ids.len();
                *ids.entry(feature).or_insert(next)
            };
            (features(&words(sentence)).into_iter().map(count).collect::<Vec<usize>>(), *label as f64)
        };
        let train: Vec<_> = text.train.iter().map(&mut encode).collect();
        let dev: Vec<_> = text.dev.iter().map(&mut encode).collect();
        let (mut weight, mut bias) = (vec![0.0; ids.len()], 0.0);
        let score = |weight: &[f64], bias: f64, x: &[usize]| bias + x.iter().map(|&i| weight[i]).sum::<f64>();
        for epoch in 0..20 {
            let rate = 0.1 / (1.0 + epoch as f64);
            for (x, label) in &train {
                let error = 1.0 / (1.0 + (-score(&weight, bias, x)).exp()) - label;
                bias -= rate * error;
                x.iter().for_each(|&i| weight[i] -= rate * error);
            }
        }
        let right =
            dev.iter().filter(|(x, label)| (score(&weight, bias, x) > 0.0) == (*label == 1.0)).count();
        right as f64 / dev.len() as f64
    }

    #[test]
    fn a_bag_of_words_does_not_solve_it() {
        let text = generate(4, 8000, 2000);
        let single = linear_model(&text, |words| words.iter().map(|w| w.to_string()).collect());
        let pairs = linear_model(&text, |words| {
            let pairs = words.windows(2).map(|w| w.join(" "));
            pairs.chain(words.iter().map(|w| w.to_string())).collect()
        });
        println!(
            "logistic regression on dev: words {:.1} %, words and word pairs {:.1} %",
            100.0 * single,
            100.0 * pairs
        );
        assert!(single < 0.70, "words alone reach {single}");
        assert!(pairs < 0.80, "word pairs reach {pairs}");
        // They should see something, or the bound would only say that this regression does not learn.
        assert!(single > 0.55, "words alone reach only {single}");
    }
}
