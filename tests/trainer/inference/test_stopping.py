"""An answer ends with its outermost brace, or where it gives one object for the third time."""

import pytest
import torch

from trainer.inference.stopping import AnswerWatch, StopWhenComplete
from trainer.model import load_tools

LEAF = '{"bbox_2d":[1,2,3,4],"desc":"one/red"}'


def read(text: str) -> str:
    """As much of a text as is read before it counts as ended."""
    watch = AnswerWatch()
    for place, letter in enumerate(text):
        if watch.ended:
            return text[:place]
        watch.read(letter)
    return text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f'{{"image_1":{{"object_1":{LEAF}}}}} and so on', f'{{"image_1":{{"object_1":{LEAF}}}}}'),
        ('{"image_1":{"object_1":{"desc":"a } in a text"', None),
        (r'{"image_1":{"object_1":{"desc":"an escaped \" and }', None),
        ('{"image_1":"a summary"} more', '{"image_1":"a summary"}'),
        ("no brace at all", None),
    ],
)
def test_it_ends_with_the_brace_that_closes_the_first_one(text: str, kept: str | None) -> None:
    """Braces inside texts do not count."""
    assert read(text) == (kept or text)


def test_it_ends_where_one_object_comes_for_the_third_time() -> None:
    """Greedy decoding that has begun to repeat itself never leaves that again."""
    objects = "".join(f'"object_{n}":{LEAF},' for n in range(1, 9))
    assert read('{"image_1":{' + objects).count(LEAF) == 3


def test_answers_of_a_batch_end_each_by_itself() -> None:
    """Asked after each token of a real tokenizer, with answers of different lengths."""
    tokenizer = load_tools("pocket").tokenizer
    short, long = (tokenizer(text).input_ids for text in ("{}", '{"image_1":{}}'))
    rows = torch.full((2, max(len(short), len(long))), tokenizer.pad_token_id)
    rows[0, : len(short)], rows[1, : len(long)] = torch.tensor(short), torch.tensor(long)
    stop = StopWhenComplete(tokenizer)
    ended = [stop(rows[:, : n + 1], torch.empty(0)).tolist() for n in range(rows.shape[1])]
    assert [each[0] for each in ended].index(True) == len(short) - 1
    assert [each[1] for each in ended].index(True) == len(long) - 1
