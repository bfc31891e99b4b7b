"""`predict` on the images of a trained run: the answers of training itself, a line and a picture each, gone on with."""

import io
import json
import os
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image

from tests.running import Trained, trained, trainer
from trainer.data.images import image_sizes
from trainer.data.records import read_records
from trainer.inference.checkpoint_source import checkpoint_of
from trainer.inference.image_files import Found, find_images
from trainer.inference.job import PICTURES, PREDICTIONS, Job
from trainer.inference.predictor import Predictor, load_predictor


@pytest.fixture(scope="module")
def done() -> Trained:
    """A run of last6_lora."""
    return trained()


@pytest.fixture(scope="module")
def checkpoint(done: Trained) -> Path:
    """Its best, of which the answers were kept as `best_predictions.jsonl`."""
    return done.checkpoint


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    """Loaded once."""
    return load_predictor(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def photos(done: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of four validation images, one in a subfolder, beside a file that is none and a broken one."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for n, record in enumerate(read_records(done.val_jsonl).records[:4]):
        shutil.copy(record.images[0].path, folder / ("more" if n == 3 else "") / f"{n}.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def told(done: Trained, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    """The command on the folder, with the run's id as its source, and the folder that it has written."""
    out = tmp_path_factory.mktemp("told") / "out"
    run_id = done.run.info.run_id
    return trainer("predict", run_id, str(photos), "--out", str(out), cwd=done.folder, store=done.store), out


def test_answers_are_those_of_training(done: Trained, predictor: Predictor) -> None:
    """Same checkpoint, same images: the texts that the run has kept, up to where an answer is complete."""
    kept = [json.loads(line) for line in done.artifact("best_predictions.jsonl").read_text().splitlines()]
    records = {record.id: record.images[0] for record in read_records(done.val_jsonl).records}
    images = [(records[each["record_id"]].path, records[each["record_id"]].size) for each in kept]
    answers = dict(predictor.predict(images, batch_size=2))
    for index, each in enumerate(kept):
        text = answers[index].text
        assert text and (each["text"].startswith(text) or text.startswith(each["text"]))


def test_every_image_gets_a_line_in_their_order(told: tuple[CompletedProcess[str], Path]) -> None:
    """In pixels, in the form of records; a broken one says why, and the status is 2 for it."""
    process, out = told
    lines = [json.loads(line) for line in (out / PREDICTIONS).read_text().splitlines()]
    assert process.returncode == 2, process.stderr
    assert [line["images"] for line in lines] == [["0.png"], ["1.png"], ["2.png"], ["more/3.png"], ["broken.png"]]
    assert "cannot be read" in lines[-1]["error"]
    assert "no answer: broken.png" in process.stdout
    for line in lines[:-1]:
        assert (line["width"], line["height"]) == (96, 96)
        assert line["answer"] in ("sound", "repaired", "unreadable")
        assert all(0 <= v <= 96 for o in line["objects"] for k, points in o.items() if k != "desc" for v in points)


def test_every_answer_is_drawn(told: tuple[CompletedProcess[str], Path]) -> None:
    """Larger than the image where that is small, so that labels can be read."""
    for name in ("0.png", "more/3.png"):
        with Image.open(told[1] / "pictures" / name) as picture:
            assert picture.size == (800, 800)


def test_an_interrupted_job_is_gone_on_with(
    checkpoint: Path, predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    """What was done stays; the last line, cut by the end of the process, is done again; the result is the same."""
    predictor = Predictor(predictor._model, predictor.recipe, max_new_tokens=24)
    key = {"checkpoint": "x"}
    whole = Job(tmp_path / "whole", find_images([photos]), key, pictures=False)
    list(whole.run(predictor, batch_size=2))
    first = Job(tmp_path / "out", find_images([photos]), key, pictures=False)
    steps = first.run(predictor, batch_size=2)
    next(steps), next(steps)
    first.close()
    part = tmp_path / "out" / f"{PREDICTIONS}.part"
    part.write_bytes(part.read_bytes()[:-5])
    again = Job(tmp_path / "out", find_images([photos]), key, pictures=False)
    assert again.summary.earlier == 1
    assert len(list(again.run(predictor, batch_size=2))) == 3
    assert (tmp_path / "out" / PREDICTIONS).read_text() == (tmp_path / "whole" / PREDICTIONS).read_text()
    assert not part.exists()
    other = Job(tmp_path / "out", find_images([photos]), {"checkpoint": "another"}, pictures=False)
    assert other.summary.earlier == 0


def test_a_folder_of_a_run_means_its_best_checkpoint(checkpoint: Path) -> None:
    """`output/RUN` and `output/RUN/best` are the same."""
    assert checkpoint_of(str(checkpoint.parent)) == checkpoint


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "."], "neither a folder nor a run's id"),
        ([".", "."], "a folder without manifest.json"),
        (["{checkpoint}", "missing.jpg"], "no such file or folder"),
        (["{checkpoint}", "empty"], "no file that ends in"),
        (["{checkpoint}", "n" * 300], "File name too long"),
        (["n" * 300, "."], "File name too long"),
        (["{checkpoint}", "photo.png", "--base", "random:2b"], "the base that the adapter was trained on"),
        (["{checkpoint}", "photo.png", "--device", "cuda:9"], "auto, cpu, or a GPU that is here"),
        (["0" * 32, "."], "Run with id.* not found"),
        (["models:/nobody@champion", "."], "nobody"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str], expected: str, checkpoint: Path, done: Trained, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where, what was got, what is allowed, what to do; and nothing is written."""
    from trainer.errors import UserError
    from trainer.inference.show_predictions import show_predictions

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", done.store)
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (64, 64)).save("photo.png")
    source, image, *options = [each.format(checkpoint=checkpoint) for each in arguments]
    chosen = {"base": "", "device": "cpu"} | {options[0].removeprefix("--"): options[1] for _ in options[:1]}
    with pytest.raises(UserError, match=expected):
        show_predictions(
            source, [Path(image)], Path("out"), batch_size=1, max_new_tokens=None, pictures=False, **chosen
        )
    assert not Path("out").exists()


def test_a_damaged_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A byte of the weights was changed."""
    from trainer.errors import ModelError
    from trainer.inference.recipe import recipe_of

    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    weights = damaged / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        recipe_of(damaged)


def test_bytes_are_answered_in_their_order(predictor: Predictor, photos: Path) -> None:
    """As those that a server gets; what is no image gets a problem, and the others their answer."""
    paths = [photos / "0.png", photos / "broken.png", photos / "1.png"]
    sizes = image_sizes([paths[0], paths[2]])
    found = predictor.predict_bytes([path.read_bytes() for path in paths], batch_size=4)
    alone = dict(predictor.predict([(p, s) for p, s in sizes.items() if not isinstance(s, str)], batch_size=4))
    assert [each.text for each in (found[0], found[2])] == [alone[0].text, alone[1].text]
    assert "cannot be read" in found[1].problem


def test_many_bytes_are_answered_in_their_order(predictor: Predictor) -> None:
    """Also above ten, whose files' names sort otherwise."""
    sizes = [(64 + n, 64) for n in range(12)]
    files = [io.BytesIO() for _ in sizes]
    for file, size in zip(files, sizes, strict=True):
        Image.new("RGB", size).save(file, "png")
    found = Predictor(predictor._model, predictor.recipe, max_new_tokens=1).predict_bytes(
        [file.getvalue() for file in files[:5]] + [b"none"] + [file.getvalue() for file in files[5:]], batch_size=16
    )
    assert [each.size for each in found] == [*sizes[:5], (0, 0), *sizes[5:]]


def job_of(out: Path, *names: str) -> Job:
    """One about images of these names, none of which has to be there."""
    return Job(
        out, Found(Path("photos"), tuple((Path("photos") / name, (8, 8)) for name in names), {}), {}, pictures=True
    )


def test_names_that_are_not_utf_8_are_written_and_found_again(tmp_path: Path) -> None:
    """A Latin-1 name is kept as JSON says it, half a line that the end of a process has left is done again."""
    name = os.fsdecode(b"caf\xe9.jpg")
    job = job_of(tmp_path, name, "图.jpg")
    job._add(name, {"objects": [], "answer": "sound"})
    job._add("图.jpg", {"objects": [], "answer": "sound"})
    job.close()
    part = tmp_path / f"{PREDICTIONS}.part"
    part.write_bytes(part.read_bytes().partition("图".encode())[0] + "图".encode()[:2])
    again = job_of(tmp_path, name, "图.jpg")
    assert again.summary.earlier == 1
    again._add("图.jpg", {"objects": [], "answer": "sound"})
    again._finish()
    lines = [json.loads(line) for line in (tmp_path / PREDICTIONS).read_text(encoding="utf-8").splitlines()]
    assert [line["images"] for line in lines] == [[name], ["图.jpg"]]


def test_each_image_has_a_picture_of_its_own_below_the_folder(tmp_path: Path) -> None:
    """Whatever its name; one that is too long with the ending is cut."""
    job = job_of(tmp_path)
    names = ["x..y.png", "x__y.png", "../x.png", "/etc/x.png", "a/../b.jpg", "字" * 84 + ".jpg", "字" * 84 + ".gif"]
    pictures = [job.picture(name) for name in names]
    assert len(set(pictures)) == len(names)
    assert all((tmp_path / PICTURES).resolve() in picture.resolve().parents for picture in pictures)
    assert all(len(os.fsencode(picture.name)) <= 255 for picture in pictures)


def test_what_predict_has_drawn_is_not_captioned(tmp_path: Path) -> None:
    """A second command on the folder that holds the results of the first."""
    for name in ("a.png", "predictions/pictures/a.png", "more/pictures/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    found = find_images([tmp_path], but_below=tmp_path / "predictions" / PICTURES)
    assert [path.relative_to(tmp_path).as_posix() for path, _ in found.images] == ["a.png", "more/pictures/b.png"]


def test_pixels_are_read_a_batch_at_a_time(predictor: Predictor, tmp_path: Path) -> None:
    """Small images first, what is too thin before them; a folder of photos does not have to fit into memory."""
    sizes = [(128, 96), (96, 96), (9, 400), (96, 128)]
    for n, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{n}.png")
    predictor = Predictor(predictor._model, predictor.recipe, max_new_tokens=1)
    read: list[str] = []
    make = predictor._encoder.prompt
    predictor._encoder.prompt = lambda record: read.append(record.id) or make(record)
    steps = predictor.predict([(tmp_path / f"{n}.png", size) for n, size in enumerate(sizes)], batch_size=1)
    done = [(index, made.problem[:5], len(read)) for index, made in steps]
    assert done == [(2, "image", 0), (1, "", 1), (0, "", 2), (3, "", 3)]
