"""The records of one run, read, checked and ready to be encoded; and the sets that are evaluated again and again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from trainer import launch
from trainer.cache import cache_folder
from trainer.config.schema import Config
from trainer.data import loader
from trainer.data.augment import Chain, Rules, Step
from trainer.data.digits import ensure_digits
from trainer.data.exchange import exchange_images
from trainer.data.loader import Batch, SampleCache, SampleSet, collate, eval_batches
from trainer.data.packing import best_fit
from trainer.data.prompts import Taxonomy, partly_visible
from trainer.data.records import Record, RecordSet, read_records
from trainer.data.template import Encoder, Sample
from trainer.data.turns import Mix
from trainer.errors import DataError
from trainer.events import EVAL, EXCHANGED, OOD, PROBE
from trainer.loop import EvalSet
from trainer.model import Tools


@dataclass(frozen=True, slots=True)
class Data:
    """The validated records of one run."""

    train: RecordSet
    val: RecordSet
    ood: RecordSet | None
    taxonomy: Taxonomy | None

    def sets(self) -> dict[str, RecordSet]:
        """`train`, `val` and, where there is one, `ood`."""
        return {"train": self.train, "val": self.val} | ({"ood": self.ood} if self.ood is not None else {})


T = TypeVar("T")


def spread(records: Sequence[T], count: int | None) -> tuple[T, ...]:
    """`count` records evenly spread over a file, the same for every seed and arm; all of them where there are fewer."""
    count = len(records) if count is None else min(count, len(records))
    return tuple(records[i * len(records) // count] for i in range(count))


@dataclass(frozen=True, slots=True)
class Files:
    """Where the data of one run lie."""

    train: Path
    val: Path
    ood: Path | None
    taxonomy: Path | None

    def sets(self) -> dict[str, Path]:
        """`train`, `val` and, where there is one, `ood`."""
        return {"train": self.train, "val": self.val} | ({"ood": self.ood} if self.ood is not None else {})


def files_from(config: Config) -> Files:
    """The files that a configuration names; where it names none, the built-in digits, made if they are not there yet.

    Raises:
        DataError: the digits cannot be written.
    """
    custom, digits = config.custom, config.custom.digits
    train, val, ood, taxonomy = custom.train_jsonl, custom.val_jsonl, custom.ood_jsonl, custom.taxonomy
    if train is None or val is None:
        try:
            paths = ensure_digits(
                cache_folder(), seed=digits.seed, n_train=digits.train, n_val=digits.val, n_ood=digits.ood
            )
        except OSError as error:
            raise DataError(
                "the built-in data",
                f"{cache_folder()}: {error.strerror}",
                "a folder that can be written",
                "set XDG_CACHE_HOME to one",
            ) from None
        train, val, taxonomy = str(paths.train), str(paths.val), taxonomy or str(paths.taxonomy)
        ood = str(paths.ood) if digits.ood else None
    return Files(Path(train), Path(val), Path(ood) if ood else None, Path(taxonomy) if taxonomy else None)


def read_data(config: Config) -> Data:
    """Read and validate all records; the built-in digits where no file is given.

    Raises:
        DataError: naming every bad record.
    """
    custom, files = config.custom, files_from(config)

    def read(path: Path) -> RecordSet:
        found = read_records(path, on_bad_record=custom.on_bad_record, allow_outside_root=custom.allow_outside_root)
        return replace(found, records=spread(found.records, custom.max_records))

    data = Data(
        train=read(files.train),
        val=read(files.val),
        ood=read(files.ood) if files.ood else None,
        taxonomy=Taxonomy.read(files.taxonomy) if files.taxonomy else None,
    )
    check_summaries(config, data.train.path, data.train.records)
    return data


def check_summaries(config: Config, path: Path, train: Sequence[Record]) -> None:
    """Hold `custom.summary_ratio` against the training records.

    Raises:
        DataError: summaries are to be trained, and there are none.
    """
    ratio = config.custom.summary_ratio
    if ratio and not any(record.images[0].summary for record in train):
        raise DataError(
            f"custom.summary_ratio {ratio:g}",
            f"no record of {path} has a summary",
            "records with a `summary`, or custom.summary_ratio 0",
            "add summaries, or set custom.summary_ratio to 0",
        )


def count_tokens(config: Config, samples: SampleSet) -> None:
    """Measure the first epoch, which decides how many steps there are, with a progress bar; `samples` remembers it."""
    if config.pack_length is None:
        return
    console = Console(stderr=True, quiet=not launch.is_first())
    bar = partial(track, description="counting tokens", console=console, disable=not console.is_terminal)
    samples.lengths(0, watch=partial(bar, transient=True))


def mix_from(config: Config, *, training: bool) -> Mix:
    """How records become samples: augmented, repeated by weight and shuffled into turns in training only."""
    custom = config.custom
    return Mix(
        images_per_turn=custom.images_per_user_turn,
        summary_ratio=custom.summary_ratio,
        seed=config.training.seed if training else None,
        chain=chain_from(config) if training else None,
    )


def chain_from(config: Config) -> Chain | None:
    """The augmentation of a run; None where it has none."""
    asked = config.custom.augmentation
    if asked.mode == "off":
        return None
    partial_word = asked.partial_word
    rules = Rules(
        min_coverage=asked.min_coverage,
        completeness_threshold=asked.completeness_threshold,
        complete_word=asked.complete_word,
        partial_word=partly_visible(config.prompts.language) if partial_word is None else partial_word,
        turned_boxes=asked.turned_boxes,
        keep_lost=asked.mode == "published_noisy",
    )
    steps = tuple(Step(op.name, op.params.prob, op.params.model_dump(exclude={"prob"})) for op in asked.ops)
    return Chain(steps, rules, config.training.seed, asked.bypass_prob, asked.bank)


def unknown_mark(config: Config, data: Data) -> tuple[str, ...]:
    """A line where augmentation marks objects with a word of ours that no record has: learned for nothing."""
    chain, key = chain_from(config), "custom.augmentation.partial_word"
    if chain is None or chain.rules.keep_lost or config.custom.augmentation.partial_word is not None:
        return ()
    word = chain.rules.partial_word
    if any(word in each.desc for record in data.train.records for each in record.objects):
        return ()
    return (
        f"{key}: what an edge cuts is marked {word!r}, which no record says; set your word, or an empty one for none",
    )


def unused_taxonomy(config: Config) -> tuple[str, ...]:
    """A line where a taxonomy is given that the prompts do not quote."""
    if config.custom.taxonomy is None or config.prompts.scheme != "A":
        return ()
    return ("custom.taxonomy: prompts.scheme A does not quote it, B does",)


def make_encoder(config: Config, tools: Tools, taxonomy: Taxonomy | None) -> Encoder:
    """What turns records into samples."""
    return Encoder(
        tools.tokenizer,
        tools.image_processor,
        scheme=config.prompts.scheme,
        language=config.prompts.language,
        emit_norm=config.custom.emit_norm,
        taxonomy=taxonomy,
        max_length=config.max_length,
        truncation=config.template.truncation_strategy,
        max_pixels=config.template.max_pixels,
    )


def check_lengths(config: Config, data: Data, encoder: Encoder) -> Data:
    """The records that can be encoded.

    Raises:
        DataError: naming every record that cannot, unless bad records are skipped.
    """
    custom = config.custom
    check = partial(
        loader.check_lengths, encoder=encoder, on_bad_record=custom.on_bad_record, summary_ratio=custom.summary_ratio
    )
    return replace(data, train=check(data.train), val=check(data.val), ood=data.ood and check(data.ood))


def check_first_epoch(path: Path, samples: SampleSet) -> None:
    """Refuse weights so small that training would begin with an epoch of nothing.

    Raises:
        DataError: the first epoch has no sample.
    """
    if not samples.count(0):
        total = sum(record.weight for record in samples.records)
        raise DataError(
            f"{path}",
            f"no sample in the first epoch: {len(samples.records)} records with weights of {total:g} in all",
            "weights that make some samples an epoch",
            "raise the weights: an epoch holds about as many samples as they add up to",
        )


def eval_sets_from(
    config: Config, data: Data, encoder: Encoder, cache: SampleCache, *, rank: int, ranks: int
) -> Mapping[str, EvalSet]:
    """The sets that are evaluated again and again, one rank's share of each; each is encoded once."""
    tracking, at_once = config.tracking, config.training.per_device_eval_batch_size
    mix = mix_from(config, training=False)

    def set_of(records: tuple[Record, ...]) -> SampleSet:
        return SampleSet(records, encoder, mix, cache=cache)

    def plain(samples: SampleSet) -> EvalSet:
        share = partial(eval_batches, samples, batch_size=at_once, capacity=config.pack_length, rank=rank, ranks=ranks)
        return EvalSet(share)

    val = set_of(data.val.records)
    sets = {EVAL: plain(val)}
    if tracking.probe_records:
        sets[PROBE] = plain(set_of(spread(data.train.records, tracking.probe_records)))
    if data.ood is not None:
        sets[OOD] = plain(set_of(data.ood.records))
    # samples of the validation set themselves: of turns put together anew there would be no loss to compare with
    places = spread(range(val.count(0)), tracking.vision_gain_records)
    if exchanged := exchange_images(val[0, place] for place in places):
        batches = exchanged_batches(exchanged, encoder.pad_id, batch_size=at_once, capacity=config.pack_length)
        sets[EXCHANGED] = EvalSet(lambda: batches[rank::ranks], every=tracking.vision_gain_every)
    return sets


def to_caption(config: Config, data: Data, encoder: Encoder) -> tuple[Record, ...]:
    """The validation samples whose answers are generated and scored; a summary has no objects to score."""
    samples = SampleSet(data.val.records, encoder, mix_from(config, training=False))
    turns = [samples.record((0, place)) for place in range(samples.count(0))]
    return spread([turn for turn in turns if turn.task == "dense"], config.tracking.generate_records)


def exchanged_batches(samples: Sequence[Sample], pad_id: int, *, batch_size: int, capacity: int | None) -> list[Batch]:
    """Encoded samples in batches of `batch_size` packs, or samples where they are not packed."""
    lengths = [len(sample.input_ids) for sample in samples]
    order = range(len(samples))
    packs = [[index] for index in order] if capacity is None else best_fit(lengths, order, capacity)
    batches = [packs[start : start + batch_size] for start in range(0, len(packs), batch_size)]
    return [collate([samples[i] for pack in b for i in pack], pad_id, packed=capacity is not None) for b in batches]
