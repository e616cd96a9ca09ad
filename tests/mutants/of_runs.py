"""Faults of training, evaluation and studies: by file and tests (old, new)."""

AVERAGE = "tests/train/test_average.py"
STREAMS = "tests/train/test_streams.py"
NOTES = "tests/train/test_notes.py"
COMMANDS = "tests/evaluate/test_planned_commands.py"

RUNS: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("fastclip/train/engine.py", AVERAGE): [
        ("TEACHER_DECAY if config.optim.ema is None else config.optim.ema", "TEACHER_DECAY"),
    ],
    ("fastclip/train/average.py", AVERAGE): [
        ("            own.copy_(new)", "            pass"),
        ("followed, 1 - self.decay)", "followed, self.decay)"),
        ("if not 0 <= decay < 1:", "if not 0 <= decay <= 1:"),
    ],
    ("fastclip/train/torch_engine.py", AVERAGE): [
        ("is not None and not self._overflowed:", "is not None:"),
    ],
    ("fastclip/train/training_data.py", "tests/train/test_training_data.py"): [
        ("Order(source.counts, config.optim.seed,", "Order(source.counts, 0,"),
        ("config.optim.seed, data.shuffle_window, weights)", "config.optim.seed, weights=weights)"),
        ("source.window = data.shuffle_window", "pass"),
    ],
    ("fastclip/train/start.py", STREAMS): [
        ("seed_rng(config.optim.seed)\n", "seed_rng(0)\n"),
        ("    if world.rank > 0:", "    if world.rank < 0:"),
    ],
    ("fastclip/train/streams.py", STREAMS): [
        ("    random.setstate((version", "    ((version"),
        ("    np.random.set_state((kind", "    ((kind"),
        ('    torch.set_rng_state(state["torch"])\n', ""),
        ("    np.random.seed(seed % 2**32)\n", ""),
    ],
    ("fastclip/train/classifier.py", "tests/train/test_image_systems.py -k prompts"): [
        ("criterion.logit_scale.copy_(", "("),
        ("if config.data.templates is not None:", "if False:"),
    ],
    ("fastclip/train/held_out.py", "tests/train/test_held_out.py -k templates or precision"): [
        ("if config.data.templates is not None:", "if False:"),
        ("return self.config.model.precision", 'return "fp32"'),
        ("            precision=self.precision,\n        )\n        for", "        )\n        for"),
    ],
    ("fastclip/train/health.py", "tests/train/test_health.py"): [
        ("named_parameters() if _is_bad(p)]", "named_parameters() if False]"),
    ],
    ("fastclip/train/meter.py", "tests/train/test_meter.py"): [
        ("self.waited / elapsed", "0.0"),
        ("self.waited += time", "self.waited = time"),
        ("peak / 2**30", "peak / 2**20"),
    ],
    ("fastclip/train/resume.py", NOTES): [
        ('if world.size != len(resumed["rng"]):', "if False:"),
        ("_note(world, \"the data's sample", "str(\"the data's sample"),
    ],
    ("fastclip/train/report.py", NOTES): [
        ("if skipped and self._first:", "if False:"),
        ("if self._grouped and self._first:", "if False:"),
    ],
    ("fastclip/train/plan.py", "tests/train/test_plan.py -k easier"): [
        ("found[0] >= 2 * plan.micro_batch else None", "False else None"),
    ],
    ("fastclip/evaluate/features.py", "tests/evaluate/test_precision.py"): [
        ("autocast(device, encoding.precision)", 'autocast(device, "fp32")'),
        (
            "autocast(device, precision):\n        return",
            'autocast(device, "fp32"):\n        return',
        ),
        ("autocast(device, precision):\n        token", 'autocast(device, "fp32"):\n        token'),
    ],
    ("fastclip/evaluate/gallery.py", "tests/evaluate/test_gallery.py"): [
        ("            if right:", "            if False:"),
        ("order.locate(0, row)", "order.locate(0, 0)"),
        ("query in images.texts[row],", "False,"),
    ],
    ("fastclip/evaluate/linear_probe.py", "tests/evaluate/test_linear_probe.py"): [
        ("stratify=stratify)", "stratify=None)"),
        (" and HELD_OUT * len(y) >= len(classes)", ""),
        ("random_state=seed", "random_state=0"),
    ],
    ("fastclip/evaluate/robustness_plot.py", "tests/evaluate/test_robustness_plot.py"): [
        ("x, y = _clipped((x, y))", "y, x = _clipped((x, y))"),
        ('original["acc1"], shifted["acc1"]', 'shifted["acc1"], original["acc1"]'),
        ('(found["acc1"], found[name]["acc1"])', '(found[name]["acc1"], found["acc1"])'),
    ],
    ("fastclip/cli/eval/classification.py", COMMANDS): [
        ("linear_probe(train, self.embed(model, self.data)", "linear_probe(train, train"),
        ("seed=self.seed", "seed=0"),
    ],
    ("fastclip/cli/eval/classification.py", "tests/train/test_evaluate.py -k held_out_images"): [
        ("self.embed(model, self.held_out)", "self.embed(model, self.data)"),
    ],
    ("fastclip/cli/eval/retrieval.py", COMMANDS): [
        ("self.encoding, self.recall_k)", "self.encoding)"),
    ],
    ("fastclip/cli/quickstart.py", "tests/cli/test_quickstart.py"): [
        ('f"{found}_retrieval_recall@{k}"', 'f"{asked}_retrieval_recall@{k}"'),
        ("metrics=metrics", "metrics=zeroshot"),
    ],
    ("fastclip/cli/search.py", COMMANDS): [
        ("list(config.texts), precision=config.precision)", "list(config.texts))"),
        ("pictures, precision=config.precision)", "pictures)"),
    ],
    ("fastclip/cli/search.py", "tests/cli/test_search.py -k framed"): [
        ("name in sample.texts", "False"),
    ],
    ("fastclip/study/language_model.py", "tests/study/test_teach.py"): [
        ("-= pooled.mean(0)", "-= 0"),
        ("    torch.manual_seed(seed)\n", "    torch.manual_seed(0)\n"),
    ],
    ("fastclip/study/robustness.py", "tests/study/test_judges.py"): [
        ("mean(scores[kind] for kind in SHIFTS)", "max(scores[kind] for kind in SHIFTS)"),
        ("if not (folder /", "if (folder /"),
        ("corrupt_shards(shard, folder, missing,", "corrupt_shards(shard, folder, kinds,"),
    ],
    ("fastclip/study/captions.py", "tests/study/test_judges.py"): [
        ('if kind != "noun")', 'if kind != "")'),
        ("composition(images.features", "composition(test.features"),
    ],
}
