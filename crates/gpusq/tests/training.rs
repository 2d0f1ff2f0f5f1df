//! The training loop and the stages on a model small enough to run in a second: what is learned, what stays
//! fixed, what a resumed run repeats.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use gpusq::arch::Config as ModelConfig;
use gpusq::compress::{Run, calibration, prune_weights};
use gpusq::config::{Config, Fit, Schedule};
use gpusq::distill::{Mix, Terms};
use gpusq::forward::{Compute, Inputs};
use gpusq::model::{Model, Stage};
use gpusq::params::Weight;
use gpusq::quant::calibrate;
use gpusq::sparsity::{Pattern, mask_rows};
use gpusq::task::{Dataset, Example, HeadKind, Scores, Split, Target, Tokenizer, task};
use gpusq::tensor::{DType, Device, Group, Patience, Seat};
use gpusq::train::batch::{collate, epoch};
use gpusq::train::teacher_cache::{Uses, bytes};
use gpusq::train::{Event, Recipe, State, Stepper, fit};

/// Of one test at a time: others' memory would decide how much of a step comes from graphs.
static GPU: Mutex<()> = Mutex::new(());

/// 64 examples: the class is whether token 5 comes before token 6.
fn data() -> Dataset {
    let examples = (0..64u32)
        .map(|i| {
            let first = i % 2 == 0;
            let (a, b) = if first { (5, 6) } else { (6, 5) };
            let mut ids = vec![2, 7 + i % 3, 10 + i % 5, 15 + i % 7, 3];
            ids.insert(1 + (i as usize / 2) % 2, a);
            ids.insert(3 + (i as usize / 4) % 2, b);
            Example { types: vec![0; ids.len()], ids, target: Target::Class(first as u32) }
        })
        .collect();
    let scorer = |e: &[Example], o: &[Vec<f32>]| {
        let right = e.iter().zip(o).filter(|(e, o)| e.target == Target::Class((o[1] > o[0]) as u32)).count();
        Scores(vec![("accuracy".into(), 100.0 * right as f64 / e.len() as f64)])
    };
    Dataset::new("toy", Split::Train, HeadKind::Classes(2), examples, scorer)
}

fn dense() -> Model {
    let text = r#"{"model_type":"bert","architectures":["BertModel"],"vocab_size":24,"hidden_size":32,
        "num_hidden_layers":2,"num_attention_heads":4,"intermediate_size":64,"max_position_embeddings":16,
        "hidden_dropout_prob":0.1,"attention_probs_dropout_prob":0.1}"#;
    let mut m = Model::random(ModelConfig::parse(Path::new("config.json"), text).unwrap(), 3).unwrap();
    m.set_head(HeadKind::Classes(2), 3).unwrap();
    m
}

fn settings(epochs: usize, rate: f64) -> Fit {
    Fit { epochs, batch_size: 8, learning_rate: rate, log_every: 4, ..Fit::default() }
}

fn recipe<'a>(fit: &'a Fit, mix: Mix, teacher: Option<&'a Model>) -> Recipe<'a> {
    Recipe {
        optimizer: fit,
        mix,
        teacher,
        scale_learning_rate: 1e-3,
        mask_update_every: 0,
        stop_loss: None,
        seed: 5,
        checkpoint: None,
        pipeline_parallel_size: 1,
        teacher_cache: None,
        pad: 0,
        compute: Compute::CPU,
        group: Group::alone(),
    }
}

const MIX: Mix = Mix { alpha: 1.0, beta: 10.0, gamma: 1.0, temperature: 2.0, attention_features: true };

fn samples(d: &Dataset) -> Vec<Inputs> {
    let all: Vec<usize> = (0..d.examples.len()).collect();
    all.chunks(16).map(|w| collate(&d.examples, w, d.head, 0).inputs).collect()
}

fn pruned(from: &Model, d: &Dataset, criterion: &str) -> Model {
    let mut c = Config::default();
    c.set("prune.criterion", criterion).unwrap();
    c.set("prune.attention", "2:4").unwrap();
    let mut m = from.clone();
    prune_weights(&mut m, &c.prune, &samples(d), Compute::CPU).unwrap();
    m
}

#[test]
fn all_stages_learn_and_keep_their_constraints() {
    let d = data();
    let mut teacher = dense();
    let f = settings(30, 2e-3);
    let report = fit(&mut teacher, &d, &recipe(&f, Mix::HARD, None), State::default(), &mut |_| {}).unwrap();
    let (first, last) = (report.curve[0].terms, report.curve.last().unwrap().terms);
    assert!(last.total < 0.5 * first.total, "{first:?} {last:?}");

    let mut sparse = pruned(&teacher, &d, "magnitude");
    let masks = |m: &Model| -> Vec<gpusq::tensor::Tensor> {
        m.params
            .iter()
            .filter_map(|(_, w)| match w {
                Weight::Masked { mask, .. } | Weight::Fake { mask, .. } => Some(mask.clone()),
                _ => None,
            })
            .collect()
    };
    let before = masks(&sparse);
    assert_eq!(before.len(), teacher.spec.linears().len());
    let f = settings(10, 1e-3);
    let report =
        fit(&mut sparse, &d, &recipe(&f, MIX, Some(&teacher)), State::default(), &mut |_| {}).unwrap();
    let (first, last) = (report.curve[0].terms, report.curve.last().unwrap().terms);
    assert!(last.soft < first.soft && last.feature < first.feature, "{first:?} {last:?}");
    assert_eq!(before, masks(&sparse), "masks are fixed");
    for (name, w) in sparse.params.iter() {
        if let Weight::Masked { value, mask } = w {
            let dropped = value.f32().iter().zip(mask.u8()).filter(|(_, m)| **m == 0);
            assert!(dropped.into_iter().all(|(v, _)| *v == 0.0), "{name}: a dropped weight moved");
        }
    }

    let mut quantized = sparse.clone();
    calibrate(&mut quantized, &samples(&d), &calibration(&Config::default().quantize), Compute::CPU).unwrap();
    let rows = gpusq::compress::layers(&quantized);
    assert_eq!(rows.len(), before.len());
    assert!(rows.iter().all(|r| r.weight_error > 0.0 && r.weight_error < 0.02 && r.kept == 0.5), "{rows:?}");
    let scales = |m: &Model| -> Vec<(String, f32)> {
        let of = |n: &str| (n.to_string(), m.params.dense(n).item());
        m.params.iter().filter(|(n, _)| n.ends_with("put_scale")).map(|(n, _)| of(n)).collect()
    };
    let start = scales(&quantized);
    fit(&mut quantized, &d, &recipe(&f, MIX, Some(&sparse)), State::default(), &mut |_| {}).unwrap();
    let learned = scales(&quantized);
    assert!(learned.iter().all(|s| s.1 > 0.0), "{learned:?}");
    let still: Vec<_> = start.iter().zip(&learned).filter(|(a, b)| a == b).collect();
    assert!(still.is_empty(), "step sizes that were not learned: {still:?}");
    assert_eq!(quantized.stage, Stage::Quantized);
    assert_eq!(before, masks(&quantized));
}

#[test]
fn wanda_sees_no_padding() {
    let d = data();
    let of = |samples: &[Inputs]| {
        let mut c = Config::default();
        c.set("prune.criterion", "wanda").unwrap();
        let mut m = dense();
        prune_weights(&mut m, &c.prune, samples, Compute::CPU).unwrap();
        // The first block's inputs are embeddings, whose bits do not depend on what else is in the batch.
        match m.params.get("encoder.0.attn.q.weight") {
            Some(Weight::Masked { mask, .. }) => mask.clone(),
            _ => panic!("not masked"),
        }
    };
    let plain = collate(&d.examples, &[0, 1, 2, 3], d.head, 0).inputs;
    let (rows, length) = (plain.tokens.batch, plain.tokens.length);
    assert_eq!(plain.tokens.mask, None);
    let mut padded = plain.clone();
    let t = &mut padded.tokens;
    t.length = length + 6;
    t.ids = plain.tokens.ids.chunks(length).flat_map(|ids| [ids, &[0; 6]].concat()).collect();
    t.types = vec![0; rows * t.length];
    t.mask = Some((0..rows * t.length).map(|i| i % t.length < length).collect());
    let mut unmasked = padded.clone();
    unmasked.tokens.mask = None;
    let mask = of(&[plain]);
    assert_eq!(mask, of(&[padded]));
    assert_ne!(mask, of(&[unmasked]), "this padding would have changed what is kept");
}

#[test]
fn a_resumed_run_has_the_bits_of_an_uninterrupted_one() {
    let d = data();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state.safetensors");
    let f = Fit { checkpoint_every: 10, ..settings(4, 1e-3) };
    let teacher = dense();
    let mut stages = vec![(dense(), Mix::HARD, None), (pruned(&teacher, &d, "wanda"), MIX, Some(&teacher))];
    let mut quantized = pruned(&teacher, &d, "magnitude");
    calibrate(&mut quantized, &samples(&d), &calibration(&Config::default().quantize), Compute::CPU).unwrap();
    stages.push((quantized, MIX, Some(&teacher)));
    for (start, mix, teacher) in stages {
        let saving = Recipe { checkpoint: Some(file.clone()), ..recipe(&f, mix, teacher) };
        let mut whole = start.clone();
        let all = fit(&mut whole, &d, &saving, State::default(), &mut |_| {}).unwrap();
        // The file now holds step 30 of 32, as if the run had been killed after it.
        let mut again = start.clone();
        let state = State::load(&file, &mut again.params).unwrap();
        assert_eq!(state.progress.step, 30);
        let rest = fit(&mut again, &d, &saving, state, &mut |_| {}).unwrap();
        assert_eq!(whole.params, again.params);
        assert_eq!(all.curve, rest.curve);
        std::fs::remove_file(&file).unwrap();
    }
}

/// Gradient accumulation, in every stage, with dropout and padding: 25 steps of batches of 10 (the last of an epoch has
/// 4), whole and in parts that do not divide them. Terms are means over examples and over tokens, which the parts have
/// in different proportions.
#[test]
fn a_batch_that_is_computed_in_parts_trains_the_same() {
    let _alone = GPU.lock().unwrap_or_else(|e| e.into_inner());
    let mut d = data();
    for (i, e) in d.examples.iter_mut().enumerate() {
        e.ids.extend(std::iter::repeat_n(9, i * i % 5));
        e.types = vec![0; e.ids.len()];
    }
    let whole =
        Fit { batch_size: 10, dropout: Some(0.1), max_steps: Some(25), log_every: 1, ..settings(100, 1e-3) };
    let teacher = dense();
    let sparse = pruned(&teacher, &d, "magnitude");
    let mut quantized = sparse.clone();
    calibrate(&mut quantized, &samples(&d), &calibration(&Config::default().quantize), Compute::CPU).unwrap();
    for device in Device::all() {
        let compute = Compute { device, ..Compute::CPU };
        for (start, mix, teacher) in
            [(&teacher, Mix::HARD, None), (&sparse, MIX, Some(&teacher)), (&quantized, MIX, Some(&sparse))]
        {
            let curve = |micro_batch_size| {
                let f = Fit { micro_batch_size, ..whole.clone() };
                let how = Recipe { compute, ..recipe(&f, mix, teacher) };
                let report = fit(&mut start.clone(), &d, &how, State::default(), &mut |_| {}).unwrap();
                report.curve.iter().map(|p| p.terms).collect::<Vec<Terms>>()
            };
            let want = curve(None);
            assert!(want.len() == 25);
            for most in [1, 4, 7] {
                for (step, (got, want)) in curve(Some(most)).iter().zip(&want).enumerate() {
                    let pairs = [
                        (got.total, want.total),
                        (got.hard, want.hard),
                        (got.soft, want.soft),
                        (got.feature, want.feature),
                    ];
                    let same = pairs.iter().all(|(a, b)| (a - b).abs() <= 2e-4 * b.abs().max(1.0));
                    assert!(
                        same,
                        "{:?}, {most} at a time, step {step}: {got:?}, whole {want:?}",
                        start.stage
                    );
                }
            }
        }
    }
}

/// Every file of the folders in `dir`.
fn kept(dir: &Path) -> Vec<std::path::PathBuf> {
    let inside = |dir: &Path| std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    let mut all: Vec<_> = inside(dir).iter().flat_map(|folder| inside(folder)).collect();
    all.sort();
    all
}

/// On every device, in every stage and in parts, with padding: without a cache, with one that fills, with one that is
/// full, and with one whose files are damaged or in each other's places.
#[test]
fn a_teachers_cache_changes_no_bit() {
    let _alone = GPU.lock().unwrap_or_else(|e| e.into_inner());
    let mut d = data();
    for (i, e) in d.examples.iter_mut().enumerate() {
        e.ids.extend(std::iter::repeat_n(9, i * i % 5));
        e.types = vec![0; e.ids.len()];
    }
    // Three epochs.
    let f = Fit {
        batch_size: 10,
        micro_batch_size: Some(7),
        max_steps: Some(21),
        log_every: 1,
        fixed_batches: true,
        ..settings(100, 1e-3)
    };
    let teacher = dense();
    let sparse = pruned(&teacher, &d, "magnitude");
    let mut fake = sparse.clone();
    calibrate(&mut fake, &samples(&d), &calibration(&Config::default().quantize), Compute::CPU).unwrap();
    let logits_only = Mix { gamma: 0.0, ..MIX };
    for device in Device::all() {
        let mut computes = vec![Compute { device, ..Compute::CPU }];
        if device != Device::Cpu {
            computes.push(Compute { device, element: DType::Bf16, tf32: false });
        }
        for compute in computes {
            let dir = tempfile::tempdir().unwrap();
            let stages = [(&sparse, MIX, &teacher), (&sparse, logits_only, &teacher), (&fake, MIX, &sparse)];
            for (i, (start, mix, teacher)) in stages.into_iter().enumerate() {
                let dir = dir.path().join(i.to_string());
                let run = |cache: Option<&Path>, f: &Fit| {
                    let mut student = start.clone();
                    let how = Recipe { compute, teacher_cache: cache, ..recipe(f, mix, Some(teacher)) };
                    let report = fit(&mut student, &d, &how, State::default(), &mut |_| {}).unwrap();
                    ((student.params, report.curve), report.cache)
                };
                let (want, none) = run(None, &f);
                assert_eq!(none, None);
                let same = |what: &str, read: usize, written: usize| {
                    let (got, uses) = run(Some(&dir), &f);
                    assert!(got == want, "{compute}, {:?}: {what}", start.stage);
                    let expected = Uses { read, written, ..Uses::default() };
                    assert_eq!(uses, Some(expected), "{compute}, {:?}: {what}", start.stage);
                };
                // Of an epoch: six batches of ten in two parts, and one of four.
                let (parts, all) = (13, 3 * 13);
                same("it fills", all - parts, parts);
                same("it is full", all, 0);
                let files = kept(&dir);
                assert_eq!(files.len(), parts);
                let expected = bytes(&teacher.spec, &d, &f, 5, &mix, compute);
                let size: u64 = files.iter().map(|f| std::fs::metadata(f).unwrap().len()).sum();
                // The rest are names and checksums.
                assert!(expected < size && size < expected + 4096 * parts as u64, "{expected} {size}");
                let [short, flipped, mistaken, other, ..] = &files[..] else { unreachable!() };
                let whole = std::fs::read(short).unwrap();
                std::fs::write(short, &whole[..whole.len() - 5]).unwrap();
                let mut whole = std::fs::read(flipped).unwrap();
                *whole.last_mut().unwrap() ^= 1;
                std::fs::write(flipped, whole).unwrap();
                std::fs::write(mistaken, "what is this").unwrap();
                std::fs::copy(&files[4], other).unwrap();
                let damaged = |f: &&std::path::PathBuf| [short, flipped, mistaken, other].contains(f);
                assert_eq!(files.iter().filter(damaged).count(), 4);
                let (got, uses) = run(Some(&dir), &f);
                assert!(got == want, "{compute}, {:?}: files are damaged", start.stage);
                assert_eq!(uses, Some(Uses { read: all - 4, written: 4, damaged: 4, ..Uses::default() }));
                same("they were written again", all, 0);
                // What cannot be written, as on a full disk, costs time alone.
                for f in &files[..2] {
                    std::fs::remove_file(f).unwrap();
                    std::fs::create_dir(f).unwrap();
                }
                let (got, uses) = run(Some(&dir), &f);
                assert!(got == want, "{compute}, {:?}: files cannot be written", start.stage);
                let Uses { read, written, damaged, lost, why } = uses.unwrap();
                // Each once in an epoch.
                assert_eq!((read, written, damaged, lost), (all - 6, 0, 0, 6));
                assert!(why.unwrap().contains(files[0].parent().unwrap().to_str().unwrap()));
                files[..2].iter().for_each(|f| std::fs::remove_dir(f).unwrap());
                assert_eq!(
                    run(Some(&dir), &f).1,
                    Some(Uses { read: all - 2, written: 2, ..Uses::default() })
                );
                // New batches in every epoch.
                let (_, uses) = run(Some(&dir), &Fit { fixed_batches: false, ..f.clone() });
                assert_eq!(uses, Some(Uses { read: parts, written: all - parts, ..Uses::default() }));
            }
            // Nobody else's outputs.
            let mut changed = teacher.clone();
            let Some(Weight::Dense(t)) = changed.params.get_mut("embed.word") else { unreachable!() };
            t.f32_mut()[0] += 1e-3;
            let how = |teacher| Recipe {
                compute,
                teacher_cache: Some(dir.path()),
                ..recipe(&f, MIX, Some(teacher))
            };
            for teacher in [&teacher, &changed] {
                let report =
                    fit(&mut sparse.clone(), &d, &how(teacher), State::default(), &mut |_| {}).unwrap();
                assert_eq!(report.cache.unwrap().written, 13);
            }
        }
    }
}

/// What `f` gives as each of `n` processes, which are threads here.
fn processes<T: Send>(n: usize, f: impl Fn(&Group) -> T + Sync) -> Vec<T> {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let seat = move |rank| Seat {
        rank,
        size: n,
        address: "127.0.0.1".into(),
        port,
        patience: Patience::default(),
        last_resort: |e| panic!("{e}"),
    };
    std::thread::scope(|s| {
        let f = &f;
        let all: Vec<_> = (0..n).map(|r| s.spawn(move || f(&Group::join(seat(r)).unwrap()))).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Every stage, with dropout, padding and batches that the parts do not divide: a pipeline has the bits of one process
/// with the same parts, where no norm of all gradients is taken, which is summed in another order; its state is one
/// process's too.
#[test]
fn a_pipeline_trains_as_one_process_does() {
    let mut d = data();
    for (i, e) in d.examples.iter_mut().enumerate() {
        e.ids.extend(std::iter::repeat_n(9, i * i % 5));
        e.types = vec![0; e.ids.len()];
    }
    let mut config = dense().config;
    config.json["num_hidden_layers"] = 3.into();
    let mut teacher = Model::random(config, 3).unwrap();
    teacher.set_head(HeadKind::Classes(2), 3).unwrap();
    let sparse = pruned(&teacher, &d, "magnitude");
    let mut quantized = sparse.clone();
    calibrate(&mut quantized, &samples(&d), &calibration(&Config::default().quantize), Compute::CPU).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state.safetensors");
    for (start, mix, teacher) in
        [(&teacher, Mix::HARD, None), (&sparse, MIX, Some(&teacher)), (&quantized, MIX, Some(&sparse))]
    {
        for (max_grad_norm, gradient_checkpointing) in [(None, false), (Some(0.5), true)] {
            let mix = Mix { attention_features: !gradient_checkpointing, ..mix };
            let f = Fit {
                batch_size: 10,
                micro_batch_size: Some(3),
                dropout: Some(0.1),
                max_steps: Some(12),
                log_every: 1,
                checkpoint_every: 5,
                max_grad_norm,
                gradient_checkpointing,
                ..settings(100, 1e-3)
            };
            let trained = |group: &Group, pipeline_parallel_size| {
                let checkpoint = (group.size() > 1 && group.is_first()).then(|| file.clone());
                let how = Recipe { group, pipeline_parallel_size, checkpoint, ..recipe(&f, mix, teacher) };
                let mut student = start.clone();
                let report = fit(&mut student, &d, &how, State::default(), &mut |_| {}).unwrap();
                (student.params, report.curve)
            };
            let (want, curve) = trained(Group::alone(), 1);
            let near = |a: f32, b: f32| (a - b).abs() <= 1e-5 * b.abs().max(1.0);
            for size in [2, 3] {
                let what = format!("{:?}, {size} processes, clipped at {max_grad_norm:?}", start.stage);
                for (params, terms) in processes(size, |group| trained(group, size)) {
                    for (got, want) in terms.iter().zip(&curve) {
                        let (a, b) = (got.terms, want.terms);
                        let pairs =
                            [(a.total, b.total), (a.feature, b.feature), (a.hard, b.hard), (a.soft, b.soft)];
                        assert!(pairs.iter().all(|(a, b)| near(*a, *b)), "{what}: {got:?}, alone {want:?}");
                    }
                    assert_eq!(terms.len(), 12);
                    assert!(params == want, "{what}: the weights differ");
                }
                // One process goes on from what the pipeline saved at step 10.
                let mut again = start.clone();
                let state = State::load(&file, &mut again.params).unwrap();
                assert_eq!(state.progress.step, 10);
                fit(&mut again, &d, &recipe(&f, mix, teacher), state, &mut |_| {}).unwrap();
                assert!(again.params == want, "{what}, resumed");
            }
        }
    }
}

#[test]
fn a_pipeline_that_cannot_be_is_refused() {
    let d = data();
    let f = settings(1, 1e-3);
    let error = |group: &Group, pipeline_parallel_size| {
        let how = Recipe { group, pipeline_parallel_size, ..recipe(&f, Mix::HARD, None) };
        fit(&mut dense(), &d, &how, State::default(), &mut |_| {}).unwrap_err().to_string()
    };
    let e = error(Group::alone(), 2);
    assert!(e.contains("a pipeline of 2 processes was asked for, and there are 1"), "{e}");
    for e in processes(3, |group| error(group, 3)) {
        assert!(e.contains("each process needs a block, and the model has 2"), "{e}");
    }
}

#[test]
fn masks_move_only_where_asked() {
    let d = data();
    let teacher = dense();
    let mut c = Config::default();
    c.set("prune.mask_update_every", "4").unwrap();
    let mut m = teacher.clone();
    prune_weights(&mut m, &c.prune, &[], Compute::CPU).unwrap();
    let mask = |m: &Model| match m.params.get("encoder.0.ffn.in.weight") {
        Some(Weight::Masked { mask, .. }) => mask.clone(),
        _ => panic!("not masked"),
    };
    let before = mask(&m);
    let f = settings(10, 5e-3);
    let how = Recipe { mask_update_every: 4, ..recipe(&f, MIX, Some(&teacher)) };
    fit(&mut m, &d, &how, State::default(), &mut |_| {}).unwrap();
    assert_ne!(before, mask(&m));
    assert!(mask(&m).u8().chunks(4).all(|g| g.iter().map(|&x| x as u32).sum::<u32>() == 2), "still 2:4");
}

#[test]
fn a_stage_stops_when_its_running_loss_is_low_enough() {
    let d = data();
    let mut m = dense();
    let f = settings(30, 2e-3);
    let mut stopped = None;
    let how = Recipe { stop_loss: Some(0.6), ..recipe(&f, Mix::HARD, None) };
    let report = fit(&mut m, &d, &how, State::default(), &mut |e| {
        if let Event::Stopped { step, running } = e {
            stopped = Some((step, running));
        }
    });
    let (step, running) = stopped.expect("the loss falls below 0.6");
    assert!(running < 0.6 && step < 240 && report.unwrap().steps == step);
}

#[test]
fn a_loss_that_is_not_finite_is_an_error_with_advice() {
    let d = data();
    let mut m = dense();
    let message = |learning_rate: f64, m: &mut Model| {
        let f = Fit { max_grad_norm: None, warmup: 0.0, ..settings(5, learning_rate) };
        fit(m, &d, &recipe(&f, Mix::HARD, None), State::default(), &mut |_| {}).unwrap_err().to_string()
    };
    // Steps that throw the weights out of range: the rate is to blame.
    let e = message(1e38, &mut m.clone());
    assert!(e.contains("at step") && !e.contains("step 1,") && e.contains("lower the learning rate"), "{e}");
    // A loss that is lost before the first step: the model is.
    let mut poisoned = m.params.dense("embed.word").clone();
    poisoned.f32_mut()[5 * 32] = f32::INFINITY;
    m.params.insert("embed.word", Weight::Dense(poisoned));
    let e = message(1.0, &mut m);
    assert!(e.contains("step 1,") && e.contains("config.json") && !e.contains("learning rate"), "{e}");
}

#[test]
fn models_are_discarded_of_finished_runs_only() {
    let out = tempfile::tempdir().unwrap();
    let (config, d, tokenizer) = (
        Config::default(),
        data(),
        Tokenizer::word_piece(&["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]).unwrap(),
    );
    let run = Run {
        config: &config,
        task: task("sst2").unwrap(),
        train: &d,
        dev: &d,
        tokenizer: &tokenizer,
        tokenizer_dir: None,
        out: out.path(),
        resume: true,
        command: String::new(),
        compute: Compute::CPU,
        group: Group::alone(),
        pipeline_parallel_size: 1,
        teacher_cache: None,
    };
    let models = ["pruned", "packed-fp16", "quantized", "packed"].map(|name| out.path().join(name));
    let other = out.path().join("mine");
    for folder in models.iter().chain([&other]) {
        std::fs::create_dir(folder).unwrap();
        std::fs::write(folder.join("model.safetensors"), "x").unwrap();
    }
    run.discard_models().unwrap();
    assert!(models.iter().all(|m| m.exists()), "the run may go on from them");
    std::fs::write(out.path().join("run.json"), "{}").unwrap();
    run.discard_models().unwrap();
    assert!(models.iter().all(|m| !m.exists()));
    assert!(other.join("model.safetensors").exists());
    // Again, where they are gone already.
    run.discard_models().unwrap();
}

/// 50 steps of every stage: the loss curves of all devices are the CPU's to 1e-3 of the loss.
#[test]
fn every_device_has_the_cpus_loss_curve() {
    let _alone = GPU.lock().unwrap_or_else(|e| e.into_inner());
    let devices = Device::all();
    let missing = devices.len() == 1 && std::env::var_os("GPUSQ_NEED_GPU").is_some();
    assert!(!missing, "GPUSQ_NEED_GPU is set: {:?}", Device::named("cuda").err());
    let (d, f) = (data(), Fit { max_steps: Some(50), log_every: 1, ..settings(100, 1e-3) });
    let teacher = dense();
    let sparse = pruned(&teacher, &d, "magnitude");
    let mut quantized = sparse.clone();
    calibrate(&mut quantized, &samples(&d), &calibration(&Config::default().quantize), Compute::CPU).unwrap();
    for (start, mix, teacher) in
        [(&teacher, Mix::HARD, None), (&sparse, MIX, Some(&teacher)), (&quantized, MIX, Some(&sparse))]
    {
        let curve = |device| {
            let compute = Compute { device, ..Compute::CPU };
            let how = Recipe { compute, ..recipe(&f, mix, teacher) };
            let report = fit(&mut start.clone(), &d, &how, State::default(), &mut |_| {}).unwrap();
            report.curve.iter().map(|p| p.terms.total).collect::<Vec<f32>>()
        };
        let want = curve(Device::Cpu);
        // An epoch is eight batches.
        assert!(want[42..].iter().sum::<f32>() < want[..8].iter().sum(), "{want:?}");
        for &device in &devices[1..] {
            for (step, (got, want)) in curve(device).iter().zip(&want).enumerate() {
                let message = format!("{device}, {:?}, step {step}: {got}, CPU {want}", start.stage);
                assert!((got - want).abs() <= 1e-3 * want.abs().max(1.0), "{message}");
            }
            println!("{device}: {:?}: 50 losses agree", start.stage);
        }
    }
}

/// On every device, in every stage: what is computed again is what was computed, with dropout too.
#[test]
fn gradient_checkpointing_changes_no_bit() {
    let _alone = GPU.lock().unwrap_or_else(|e| e.into_inner());
    let d = data();
    let kept = Fit { max_steps: Some(6), log_every: 1, ..settings(1, 1e-3) };
    assert!(kept.dropout.is_none() && dense().spec.encoder.unwrap().dropout.attention > 0.0, "with dropout");
    let again = Fit { gradient_checkpointing: true, ..kept.clone() };
    let mix = Mix { attention_features: false, ..MIX };
    let teacher = dense();
    let sparse = pruned(&teacher, &d, "magnitude");
    let mut fake = sparse.clone();
    calibrate(&mut fake, &samples(&d), &calibration(&Config::default().quantize), Compute::CPU).unwrap();
    for device in Device::all() {
        for (start, teacher) in [(&teacher, None), (&sparse, Some(&teacher)), (&fake, Some(&sparse))] {
            let trained = |f: &Fit| {
                let mut student = start.clone();
                let how = Recipe { compute: Compute { device, ..Compute::CPU }, ..recipe(f, mix, teacher) };
                let report = fit(&mut student, &d, &how, State::default(), &mut |_| {}).unwrap();
                (student.params, report.curve)
            };
            assert!(trained(&kept) == trained(&again), "{device}, {:?}", start.stage);
        }
    }
}

/// Every stage in f32 and bf16, with dropout, batches in parts, of several lengths, padded and not, and new masks on the
/// way: a GPU's steps from graphs have the bits of those that are launched, which a resumed run does at first.
#[test]
fn steps_from_graphs_have_the_bits_of_others() {
    let _alone = GPU.lock().unwrap_or_else(|e| e.into_inner());
    let devices = Device::all();
    let missing = devices.len() == 1 && std::env::var_os("GPUSQ_NEED_GPU").is_some();
    assert!(!missing, "GPUSQ_NEED_GPU is set: {:?}", Device::named("cuda").err());
    let mut d = data();
    for (i, e) in d.examples.iter_mut().enumerate() {
        e.ids.extend(std::iter::repeat_n(4, i / 4 % 3));
        e.types = vec![0; e.ids.len()];
    }
    const STEPS: usize = 60;
    const MASKS: usize = 7;
    let teacher = dense();
    let sparse = pruned(&teacher, &d, "magnitude");
    let mut fake = sparse.clone();
    calibrate(&mut fake, &samples(&d), &calibration(&Config::default().quantize), Compute::CPU).unwrap();
    let constant = Fit { max_steps: Some(STEPS), log_every: 1, warmup: 0.0, ..settings(100, 1e-3) };
    let whole = Fit { schedule: Schedule::Constant, ..constant };
    let halves = Fit { micro_batch_size: Some(4), ..whole.clone() };
    for &device in &devices[1..] {
        for (start, mix, teacher, element, f) in [
            (&teacher, Mix::HARD, None, DType::Bf16, &whole),
            (&sparse, MIX, Some(&teacher), DType::F32, &whole),
            (&sparse, MIX, Some(&teacher), DType::Bf16, &halves),
            (&fake, MIX, Some(&sparse), DType::F32, &halves),
            (&fake, MIX, Some(&sparse), DType::Bf16, &whole),
        ] {
            let compute = Compute { device, element, tf32: false };
            let how = Recipe { compute, mask_update_every: MASKS, ..recipe(f, mix, teacher) };
            let mut student = start.clone();
            let report = fit(&mut student, &d, &how, State::default(), &mut |_| {}).unwrap();
            // The first steps of a new stepper are launched.
            let mut launched = start.clone();
            launched.params = launched.params.to(device);
            let mut moments = BTreeMap::new();
            for step in 0..STEPS {
                let order = epoch(&d.examples, f, how.seed, step / 8);
                let batch = collate(&d.examples, &order[step % 8], d.head, how.pad);
                let parts = batch.parts(0, 1, f.micro_batch_size.unwrap_or(8), teacher.is_some());
                let stepper = Stepper::new(&launched, &how).unwrap();
                let terms = stepper.step(&mut launched, &mut moments, &parts, step, f.learning_rate).unwrap();
                let what = format!("{compute}, {:?}, step {step}", start.stage);
                assert_eq!(terms, report.curve[step].terms, "{what}");
                if (step + 1) % MASKS == 0 {
                    for (_, w) in launched.params.iter_mut() {
                        if let Weight::Masked { value, mask } | Weight::Fake { value, mask, .. } = w {
                            let (host, mut chosen) = (value.to(Device::Cpu), mask.to(Device::Cpu));
                            mask_rows(host.f32(), host.width(), Pattern::TWO_FOUR, chosen.u8_mut());
                            *mask = chosen.to(device);
                        }
                    }
                }
            }
            assert!(student.params == launched.params.to(Device::Cpu), "{compute}, {:?}", start.stage);
            println!("{compute}, {:?}: {} of {STEPS} steps from graphs", start.stage, report.replayed);
            assert!(report.replayed > STEPS / 2, "{} of {STEPS} steps", report.replayed);
        }
    }
}

/// bf16 with widths that neither tensor cores nor 16-byte loads like, and with one that they do: every stage's first
/// losses are those of f32 but for rounding, and all stay finite. The width that four does not divide leaves weights
/// dense.
#[test]
fn odd_and_even_widths_train_in_bf16() {
    let _alone = GPU.lock().unwrap_or_else(|e| e.into_inner());
    let devices = Device::all();
    let missing = devices.len() == 1 && std::env::var_os("GPUSQ_NEED_GPU").is_some();
    assert!(!missing, "GPUSQ_NEED_GPU is set: {:?}", Device::named("cuda").err());
    let (d, f) = (data(), Fit { max_steps: Some(4), log_every: 1, ..settings(100, 1e-3) });
    for (hidden, heads, inner) in [(36, 3, 44), (30, 3, 52), (64, 2, 128)] {
        let text = format!(
            r#"{{"model_type":"bert","architectures":["BertModel"],"vocab_size":24,"hidden_size":{hidden},
            "num_hidden_layers":2,"num_attention_heads":{heads},"intermediate_size":{inner},"max_position_embeddings":16}}"#
        );
        let config = ModelConfig::parse(Path::new("config.json"), &text).unwrap();
        let mut teacher = Model::random(config, 3).unwrap();
        teacher.set_head(HeadKind::Classes(2), 3).unwrap();
        let sparse = pruned(&teacher, &d, "magnitude");
        let mut quantized = sparse.clone();
        let how = calibration(&Config::default().quantize);
        calibrate(&mut quantized, &samples(&d), &how, Compute::CPU).unwrap();
        for (start, mix, teacher) in
            [(&teacher, Mix::HARD, None), (&sparse, MIX, Some(&teacher)), (&quantized, MIX, Some(&sparse))]
        {
            let curve = |compute| {
                let how = Recipe { compute, ..recipe(&f, mix, teacher) };
                let report = fit(&mut start.clone(), &d, &how, State::default(), &mut |_| {}).unwrap();
                report.curve.iter().map(|p| p.terms.total).collect::<Vec<f32>>()
            };
            let want = curve(Compute::CPU);
            for &device in &devices[1..] {
                for (step, (got, want)) in
                    curve(Compute { device, element: DType::Bf16, tf32: false }).iter().zip(&want).enumerate()
                {
                    let message = format!("{device}, width {hidden}, {:?}, step {step}", start.stage);
                    assert!((got - want).abs() <= 0.05 * want.max(0.1), "{message}: {got}, CPU {want}");
                }
            }
        }
    }
}
