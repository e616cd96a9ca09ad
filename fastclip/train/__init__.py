"""Training: one readable loop, exact resume, open_clip's flag names.

| rooms | what |
| --- | --- |
| `config`, `options`, `open_clip_flags` | the configuration, its sections of flags, open_clip's |
| `loop`, `state` | the loop, and the value that it takes from step to step |
| `start`, `training_data`, `classifier`, `layers` | built before the first step |
| `run_directory`, `describe`, `summary` | its name, its holder, what is said at start and end |
| `next_commands` | what can be done with a trained run |
| `inherited` | the settings of a run that resumes, where they are not given |
| `resume`, `saving`, `best`, `streams` | checkpoints read and written; the random streams in them |
| `select_engine`, `engine`, `torch_engine` | forward, backward and update of a batch |
| `fsdp`, `shard` | the same by FSDP2 |
| `zero`, `zero_config` | the same by DeepSpeed |
| `sharded_checkpoint` | folders that all ranks write |
| `objective`, `teacher` | outputs and loss; a teacher's features |
| `accumulate`, `wrapped`, `optim`, `average` | exact gradients, updates |
| `validate`, `held_out` | evaluation at the ends of epochs |
| `report`, `meter`, `log`, `health` | bar, speed, files of metrics, hints and NaN |
| `distributed`, `watch`, `stop` | several ranks, those that fail, signals |
| `plan`, `costs`, `footprint` | `fastclip plan`: what a setting costs |
| `card` | what a run's files say of its model, for publishing |
"""
