"""The commands of the trainer beside `run` and `plan`: where each is."""

from trainer.compare_command import compare
from trainer.data_commands import convert, preview, validate
from trainer.inference.export_command import export
from trainer.inference.predict_command import predict
from trainer.pocket_command import pocket_base
from trainer.sweep_command import sweep
from trainer.sync_command import sync

COMMANDS = (validate, preview, convert, compare, sweep, predict, export, sync, pocket_base)
