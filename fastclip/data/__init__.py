"""From shards to batches: samples in a reproducible order, augmented, with their captions.

| rooms | what |
| --- | --- |
| `sources`, `options` | what `--train-data` names, and how it is read |
| `index`, `counts`, `shards`, `samples`, `complexity`, `remote`, `http` | webdataset tars |
| `regular` | opening files that somebody else named |
| `files`, `tables`, `folders`, `strings`, `templates` | images named by CSV, COCO and folders |
| `generated`, `scenes`, `collages` | samples that are made: the embedded worlds, noise |
| `streams`, `variants` | what both worlds share: draws, and their names in `--train-data` |
| `order`, `training_samples`, `loader`, `watchdog`, `faults` | which sample when, and batches |
| `augment`, `views`, `jpeg`, `dali` | parameters of views, and the two pipelines |
| `captions`, `text_augment`, `hard_negatives`, `tokens`, `labels` | texts, labels |
| `check`, `preview` | looking at data |
| `convert`, `imagenet_captions`, `recaption`, `corrupt`, `writing`, `editing` | making shards |
| `order_perturbations` | ARO's shuffled captions |
"""
