"""Keys of existing files that have no effect here, each with the reason a user is told."""

NO_EFFECT: dict[str, str] = {
    "tuner.use_swift_lora": "adapters are PEFT's own",
    "training.add_version": "every run has a folder of its own",
    "training.logging_dir": "metrics go to MLflow",
    "training.report_to": "metrics go to MLflow",
    "training.save_safetensors": "adapters are always written as safetensors",
    "data.dataset": "records come from custom.train_jsonl",
    "data.eval_dataset": "records come from custom.val_jsonl",
    "data.dataset_num_proc": "records are read and checked by threads",
    "data.dataloader_pin_memory": "batches are small beside a step and are copied as they are",
}
"""Dotted key -> why it changes nothing. A value that would change what a run does belongs in the schema instead."""

ONE_LENGTH_KNOB = "global_max_length takes its place"
"""Why `template.max_length` has no effect where both are given."""

SAMPLES_DECIDE = "training.eval_samples takes its place"
"""Why `training.eval_steps` has no effect beside it."""

REGEX_DECIDES = "tuner.target_regex decides"
"""Why `target_modules` and the parts that they are looked for in have no effect beside it."""
