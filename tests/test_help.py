"""What `--help` says, of every command of the trainer and of the analysis: complete, and examples that can be typed."""

import re
import shlex

import click
import pytest
import yaml

from analysis.__main__ import cli as analysis
from tests.running import ROOT
from trainer.__main__ import cli as trainer
from trainer.config.messages import field_of
from trainer.errors import ConfigError
from trainer.options import OneOf, is_true, one_of, whole_number

GROUPS = {"trainer": trainer, "analysis": analysis}
COMMANDS = [(package, name) for package, group in GROUPS.items() for name in group.commands]
ENTRY_POINTS = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]


def shown(package: str, name: str) -> str:
    """The help of a command, as wide as needed."""
    command = GROUPS[package].commands[name]
    with click.Context(command, info_name=name, terminal_width=1000, max_content_width=1000) as context:
        return command.get_help(context)


def examples(text: str) -> list[list[str]]:
    """The words of every command that a help text shows, without the remark behind it."""
    lines = re.findall(r"^ *((?:python -m|mlflow) .+)$", text, re.MULTILINE)
    return [shlex.split(re.split(r" {2,}", line)[0]) for line in lines]


@pytest.mark.parametrize(("package", "name"), COMMANDS, ids=" ".join)
def test_help_names_what_a_command_does_what_each_option_takes_and_shows_it_at_work(package: str, name: str) -> None:
    """A line for the list of commands, a text, an example of its own; every option has a word and names its kind."""
    command, text = GROUPS[package].commands[name], shown(package, name)
    assert command.short_help and command.help and command.short_help.endswith(".")
    assert ["python", "-m", package, name] in [words[:4] for words in examples(text)]
    for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
        assert option.help and option.help.endswith((".", '".')), option.name
    assert not re.search(r"^  --\S+.* (TEXT|INTEGER|PATH)\b", text, re.MULTILINE)
    assert "|]" not in text and "[|" not in text  # the empty text of `mlflow run` is no choice


@pytest.mark.parametrize("package", GROUPS)
def test_the_list_of_commands_is_whole_and_in_the_order_of_use(package: str) -> None:
    """None is cut; `run` comes first, and what makes runs before what uses them."""
    group = GROUPS[package]
    with click.Context(group, info_name=package) as context:
        text = group.get_help(context)
        assert group.list_commands(context)[0] == {"trainer": "run", "analysis": "rank"}[package]
    for name, command in group.commands.items():
        assert re.search(rf"^  {name} +{re.escape(command.short_help or '')}$", text, re.MULTILINE), name


@pytest.mark.parametrize(("package", "name"), COMMANDS, ids=" ".join)
def test_every_example_is_understood(package: str, name: str) -> None:
    """Its command, its options and their values are known; what is left over are keys of the configuration."""
    for words in examples(shown(package, name)):
        if words[0] == "mlflow":
            if words[1] == "run":
                assert words[3] == "-e" and words[5] == "-P"
                assert words[6].partition("=")[0] in ENTRY_POINTS[words[4]]["parameters"]
            continue
        command = GROUPS[words[2]].commands[words[3]]
        with command.make_context(words[3], words[4:]) as context:
            keys = [word.removeprefix("--") for word in context.args[::2]]
        assert all(field_of(key) for key in keys), words


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_a_command_is_found_under_both_spellings(group: click.Group) -> None:
    """As MLproject names its entry point, and with hyphens."""
    with click.Context(group) as context:
        for name in group.commands:
            assert group.get_command(context, name.replace("_", "-")) is group.commands[name]
        assert group.get_command(context, "nope") is None


def test_what_mlflow_run_passes_for_nothing_is_no_value() -> None:
    """The empty text: of a switch false, of a number and of a choice none."""
    assert not is_true("--dry_run", "") and is_true("--dry_run", "true") and not is_true("--dry_run", "No")
    assert whole_number("--jobs", "", at_most=9) is None and whole_number("--jobs", "9", at_most=9) == 9
    assert OneOf(["a", "b"]).convert("", None, None) == ""
    with pytest.raises(click.BadParameter, match="not one of 'a', 'b'"):
        OneOf(["a", "b"]).convert("c", None, None)


@pytest.mark.parametrize(
    ("check", "got", "allowed"),
    [
        (lambda: is_true("--x", "maybe"), "'maybe'", "true or false"),
        (lambda: one_of("--x", "c", ("a", "b")), "'c'", "a, b"),
        (lambda: whole_number("--x", "0", at_most=9), "'0'", "a whole number from 1 to 9"),
        (lambda: whole_number("--x", "10", at_most=9), "'10'", "a whole number from 1 to 9"),
        (lambda: whole_number("--x", "²", at_most=9), "'²'", "a whole number from 1 to 9"),
    ],
)
def test_a_value_that_is_none_of_those_is_told_in_four_parts(check, got: str, allowed: str) -> None:
    """Under the option's own name, everywhere in the same words."""
    with pytest.raises(ConfigError) as error:
        check()
    assert (error.value.where, error.value.got, error.value.allowed) == ("--x", got, allowed)
    assert error.value.do
