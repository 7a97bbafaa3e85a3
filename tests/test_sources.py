"""The sources: what they read, how classes and samples are numbered, and what each kind of broken data is told."""

import io
import json
import os
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from streamcl.scenarios.sources.arrays import Arrays
from streamcl.scenarios.sources.csv import Csv
from streamcl.scenarios.sources.digits import Digits
from streamcl.scenarios.sources.features import Features
from streamcl.scenarios.sources.folder import Folder
from streamcl.scenarios.sources.huggingface import HuggingFace
from streamcl.scenarios.sources.parquet import Parquet
from streamcl.scenarios.sources.sklearn import Sklearn
from streamcl.scenarios.sources.torchvision import Torchvision

from streamcl.data import FileDataset, split_by_class, whole
from streamcl.data_files import locate, source_for
from streamcl.errors import ConfigError, DataError
from streamcl.nn.backbone import Backbone
from streamcl.seeding import generator
from streamcl.stream import Modality

DATA = os.environ.get("STREAMCL_DATA")
real_data = pytest.mark.skipif(not DATA or not (Path(DATA) / "cifar10-test.parquet").exists(), reason="STREAMCL_DATA is not there")


def picture(value, width=4, height=3):
    """A PNG of one grey value, as bytes."""
    stream = io.BytesIO()
    Image.new("L", (width, height), value).save(stream, "PNG")
    return stream.getvalue()


def sound(samples, rate=100, channels=1):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, dtype="<i2").tobytes())
    return stream.getvalue()


def parquet(file, columns, features=None):
    metadata = {"huggingface": json.dumps({"info": {"features": features, "license": "cc0-1.0"}})} if features else None
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file)
    return str(file)


def pictures(values, **size):
    return [{"bytes": picture(value, **size), "path": None} for value in values]


IMAGE_FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


# What in-memory sources share -----------------------------------------------------------------------------------------------------


def test_a_split_by_class_takes_its_share_of_every_class_and_leaves_each_one_sample():
    targets = torch.tensor([0] * 10 + [1] * 5 + [2] * 5 + [3])
    kept, held = split_by_class(targets, 0.3, generator(0))
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(21))
    assert torch.bincount(targets[held], minlength=4).tolist()[0] == 3
    assert len(held) == 6 and 3 in targets[kept]
    assert torch.bincount(targets[split_by_class(targets, 0.0, generator(0), at_least=1)[1]], minlength=4).tolist() == [1, 1, 1, 0]


def test_digits_and_iris_are_split_by_class_and_an_id_is_the_row():
    digits, iris = Digits(test_fraction=0.5).load(), Sklearn(set="iris").load()
    assert sorted(digits.train.ids.tolist() + digits.test.ids.tolist()) == list(range(1797))
    everything = Digits(test_fraction=0).load().train
    for part in (digits.train, digits.test):
        assert torch.equal(part[torch.arange(20)].inputs["image"], everything[part.ids[:20]].inputs["image"])
    assert torch.bincount(iris.test.targets).tolist() == [15, 15, 15]
    assert iris.class_names == ["setosa", "versicolor", "virginica"] and iris.licence == "CC BY 4.0"
    assert Digits(test_fraction=0).load().test is None


def test_sklearn_features_are_standardised_by_the_training_part():
    data = Sklearn(set="wine").load()
    train, test = whole(data.train).inputs["vector"], whole(data.test).inputs["vector"]
    assert train.dtype == torch.float32 and train.shape[1] == 13
    torch.testing.assert_close(train.mean(0), torch.zeros(13), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(13))
    assert test.mean(0).abs().max() > 1e-3


# Parquet --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["eager", "lazy"])
def test_parquet_images_become_rgb_of_their_own_size_under_declared_names(tmp_path, decode):
    train = parquet(tmp_path / "a.parquet", {"image": pictures([10, 20, 30]), "label": [1, 0, 1]}, IMAGE_FEATURES)
    test = parquet(tmp_path / "b.parquet", {"image": pictures([40]), "label": [1]}, IMAGE_FEATURES)
    source = Parquet(path=train, test=test, decode=decode)
    data = source.load()
    assert isinstance(data.train, FileDataset) == (decode == "lazy")
    batch = data.train[torch.tensor([2, 0])]
    assert batch.inputs["image"].dtype == torch.uint8
    assert torch.equal(batch.inputs["image"], torch.tensor([30, 10], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 3, 4))
    assert batch.target.tolist() == [1, 1] and batch.ids.tolist() == [2, 0]
    assert whole(data.test).ids.tolist() == [3]
    assert data.class_names == ["cat", "dog"] and data.licence == "cc0-1.0"
    assert data.modalities == {"image": Modality("image", (3, 3, 4), 255)}
    assert source.files() == [train, test]


def test_lazy_images_come_in_order_through_workers_and_leave_the_random_state_alone(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"image": pictures(range(30)), "label": [0, 1] * 15}, IMAGE_FEATURES)
    data = Parquet(path=path, decode="lazy", workers=2).load()
    state = torch.get_rng_state()
    read = [batch.inputs["image"][:, 0, 0, 0].tolist() for batch in data.train.batches(7)]
    assert read == [list(range(start, min(start + 7, 30))) for start in range(0, 30, 7)]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("decode", ["eager", "lazy"])
def test_an_image_that_does_not_decode_is_named_or_left_out_and_counted(tmp_path, decode):
    images = pictures([1, 2, 3, 4])
    images[2]["bytes"] = b"this is text"
    path = parquet(tmp_path / "a.parquet", {"image": images, "label": [0, 1, 0, 1]}, IMAGE_FEATURES)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: this is no image"):
        list(Parquet(path=path, decode=decode).load().train.batches(1))
    data = Parquet(path=path, decode=decode, on_error="skip").load()
    assert data.problems == {"image that does not decode": 1}
    assert whole(data.train).inputs["image"][:, 0, 0, 0].tolist() == [1, 2, 4]
    assert data.train.ids.tolist() == [0, 1, 2] and data.train.targets.tolist() == [0, 1, 1]


def test_an_error_in_a_worker_is_one_sentence(tmp_path):
    images = pictures(range(8))
    images[5]["bytes"] = None
    path = parquet(tmp_path / "a.parquet", {"image": images, "label": [0, 1] * 4}, IMAGE_FEATURES)
    data = Parquet(path=path, decode="lazy", workers=2).load()
    with pytest.raises(DataError) as caught:
        list(data.train.batches(2))
    told = "this is no image that can be read: it is empty; on_error: skip leaves such records out"
    assert str(caught.value) == f"{path}, row 5: {told}"


def test_a_sound_that_ends_before_its_header_says_is_no_sound(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
    encoded = sound(np.zeros(8000, dtype="<i2"))
    (tmp_path / "a" / "whole.wav").write_bytes(encoded)
    (tmp_path / "b" / "cut.wav").write_bytes(encoded[:3000])
    with pytest.raises(DataError, match=r"cut\.wav: .* it ends after 1478 of the 8000 samples that it announces; on_error: skip"):
        Folder(path=tmp_path, test_fraction=0.0, decode="eager").load()
    kept = Folder(path=tmp_path, on_error="skip").load()
    assert kept.problems == {"audio that does not decode": 1} and len(kept.train) == 1


def test_images_of_several_sizes_need_a_size(tmp_path):
    images = [*pictures([7]), *pictures([9], width=8, height=4)]
    path = parquet(tmp_path / "a.parquet", {"image": images, "label": [0, 1]}, IMAGE_FEATURES)
    with pytest.raises(DataError, match=r"row 1: this image is 8 x 4 and the others are 4 x 3: give `size`"):
        Parquet(path=path).load()
    data = Parquet(path=path, size=2).load()
    assert data.modalities["image"].shape == (3, 2, 2)
    assert whole(data.train).inputs["image"].flatten(1).unique(dim=1).tolist() == [[7], [9]]


def test_labels_outside_the_declared_classes_and_empty_labels_name_their_row(tmp_path):
    first = parquet(tmp_path / "train-0.parquet", {"image": pictures([1, 2]), "label": [0, 1]}, IMAGE_FEATURES)
    parquet(tmp_path / "train-1.parquet", {"image": pictures([3, 4]), "label": [1, 2]}, IMAGE_FEATURES)
    with pytest.raises(DataError, match=r"train-1\.parquet, row 1: the label '2' is not among the declared classes"):
        Parquet(path=str(tmp_path)).load()
    parquet(tmp_path / "train-1.parquet", {"image": pictures([3, 4]), "label": [None, 1]}, IMAGE_FEATURES)
    with pytest.raises(DataError, match=r"train-1\.parquet, row 0: the label is empty"):
        Parquet(path=str(tmp_path / "train-*.parquet")).load()
    assert len(Parquet(path=first).load().train) == 2


def test_a_folder_of_parquet_files_has_its_parts_by_name(tmp_path):
    for part, labels in (("train-0", [0, 1]), ("train-1", [1]), ("test-0", [0]), ("validation-0", [1])):
        parquet(tmp_path / f"{part}.parquet", {"image": pictures(labels), "label": labels}, IMAGE_FEATURES)
    data = Parquet(path=str(tmp_path)).load()
    assert data.train.targets.tolist() == [0, 1, 1] and data.test.targets.tolist() == [0]


def test_numeric_columns_are_one_vector_and_lists_another(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"a": [1, 2], "b": [0.5, 0.25], "v": [[1.0, 2.0], [3.0, 4.0]], "class": ["y", "x"]})
    numbers = Parquet(path=path, input=["a", "b"]).load()
    assert whole(numbers.train).inputs["vector"].tolist() == [[1, 0.5], [2, 0.25]] and numbers.class_names == ["x", "y"]
    assert whole(Parquet(path=path).load().train).inputs["vector"].tolist() == [[1, 2], [3, 4]]
    both = whole(Parquet(path=path, input=["v", "a", "b"]).load().train).inputs
    assert {name: values.shape[1] for name, values in both.items()} == {"v": 2, "a": 2}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"v": [[1.0], [float("nan")]], "label": [0, 1]}, {}, r"row 1: 'v' holds NaN"),
        ({"v": [[1.0], [1.0, 2.0]], "label": [0, 1]}, {}, r"row 1: 'v' is of another length"),
        ({"a": [1.0, None], "label": [0, 1]}, {}, r"row 1: 'a' is empty"),
        ({"a": [1.0, 2.0], "label": [0.5, 1.0]}, {}, r"row 0: the label 0.5 is no class"),
        ({"text": ["a", None], "label": [0, 1]}, {}, r"row 1: the text in 'text' is missing"),
        ({"text": ["a"], "title": ["b"], "label": [0]}, {}, r"several columns are text \(text, title\)"),
        ({"text": ["a"], "kind": [0]}, {}, r"no column is named label"),
        ({"text": ["a"], "label": [0]}, {"label": "labl"}, r"there is no 'labl' \(label\): did you mean 'label'"),
        ({"text": ["a"], "label": [0]}, {"input": "txt"}, r"there is no 'txt' \(input\): did you mean 'text'"),
        ({"flag": [True], "label": [0]}, {"input": "flag"}, r"the column 'flag' of type bool cannot be an input"),
        ({"a": pa.array([], pa.float64()), "label": pa.array([], pa.int64())}, {}, r"not a single record"),
    ],
)
def test_wrong_columns_are_told_with_the_file(tmp_path, columns, options, message):
    path = parquet(tmp_path / "a.parquet", columns)
    with pytest.raises((DataError, ConfigError), match=r"a\.parquet.*" + message):
        Parquet(path=path, **options).load()


def test_a_file_that_is_no_parquet_is_one_sentence(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.parquet: this is no Parquet file"):
        Parquet(path=str(tmp_path / "a.parquet")).load()


def test_sounds_are_mono_and_cut_or_padded_to_seconds(tmp_path):
    stereo = sound([100, 300, 0, 0], channels=2)
    records = [{"bytes": data, "path": None} for data in (sound([16384, -32768, 5]), stereo)]
    path = parquet(tmp_path / "a.parquet", {"audio": records, "label": [0, 1]})
    with pytest.raises(DataError, match="2 samples long and the others are 3 samples long: give `seconds`"):
        Parquet(path=path).load()
    data = Parquet(path=path, seconds=0.04).load()
    expected = torch.tensor([[16384, -32768, 5, 0], [200, 0, 0, 0]]) / 32768
    assert torch.equal(whole(data.train).inputs["audio"], expected)
    assert data.modalities == {"audio": Modality("audio", (4,))}


@real_data
def test_cifar10_and_spoken_digits_are_read_as_hugging_face_wrote_them():
    cifar = Parquet(path="cifar10-test.parquet", test_fraction=0.1, decode="lazy").load()
    assert (len(cifar.train), len(cifar.test)) == (3600, 400) and cifar.class_names[3] == "cat"
    eager = Parquet(path="cifar10-test.parquet", test_fraction=0.1).load()
    some = torch.tensor([5, 1000, 17])
    assert torch.equal(cifar.train[some].inputs["image"], eager.train[some].inputs["image"])
    digits = Parquet(path="fsdd-test.parquet", seconds=0.5).load()
    assert digits.modalities == {"audio": Modality("audio", (4000,))} and len(digits.class_names) == 10


# Hugging Face ---------------------------------------------------------------------------------------------------------------------


def test_a_data_set_saved_by_datasets_is_read_like_its_parquet_files(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    part = datasets.Dataset.from_dict({"image": pictures([1, 2, 3]), "label": [1, 0, 1]}, features=features)
    datasets.DatasetDict({"train": part, "test": part.select([2, 0])}).save_to_disk(str(tmp_path / "saved"))
    part.to_parquet(str(tmp_path / "file.parquet"))
    source = HuggingFace(path=str(tmp_path / "saved"), decode="lazy", workers=0)
    data, same = source.load(), Parquet(path=str(tmp_path / "file.parquet")).load()
    assert data.class_names == same.class_names == ["cat", "dog"]
    assert torch.equal(whole(data.train).inputs["image"], whole(same.train).inputs["image"])
    assert whole(data.test).inputs["image"][:, 0, 0, 0].tolist() == [3, 1] and data.test.ids.tolist() == [3, 4]
    assert source.files() == [str(tmp_path / "saved")]
    with pytest.raises(ConfigError, match="has no split 'valid'"):
        HuggingFace(path=str(tmp_path / "saved"), train="valid").load()


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach the hub\n (offline)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"huggingface: nobody/nothing could not be loaded .*: Couldn't reach the hub \(offline\)$"):
        HuggingFace(path="nobody/nothing").load()


# Folders --------------------------------------------------------------------------------------------------------------------------


def fill(folder, classes):
    for name, files in classes.items():
        (folder / name).mkdir(parents=True)
        for file, data in files.items():
            (folder / name / file).write_bytes(data)


def test_a_folder_is_read_by_class_with_its_test_part(tmp_path):
    fill(tmp_path / "train", {"b": {"2.png": picture(2), "1.png": picture(1)}, "a": {"3.png": picture(3), ".hidden": b""}})
    fill(tmp_path / "test", {"b": {"9.png": picture(9)}})
    data = Folder(path=str(tmp_path)).load()
    assert data.class_names == ["a", "b"] and data.train.targets.tolist() == [0, 1, 1]
    assert whole(data.train).inputs["image"][:, 0, 0, 0].tolist() == [3, 1, 2]
    assert data.test.targets.tolist() == [1] and data.test.ids.tolist() == [3]


def test_a_folder_of_sounds_is_audio(tmp_path):
    fill(tmp_path, {"hi": {"a.wav": sound([1, 2])}, "ho": {"b.wav": sound([3, 4])}})
    data = Folder(path=str(tmp_path)).load()
    assert torch.equal(whole(data.train).inputs["audio"] * 32768, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_text_where_an_image_is_expected_names_the_file(tmp_path):
    fill(tmp_path, {"a": {"1.png": picture(1), "2.txt": b"text"}, "b": {"3.png": b"text"}})
    with pytest.raises(DataError, match=r"2\.txt: this is no image file by its ending"):
        Folder(path=str(tmp_path)).load()
    (tmp_path / "a" / "2.txt").unlink()
    with pytest.raises(DataError, match=r"3\.png: this is no image that can be read"):
        Folder(path=str(tmp_path)).load()
    fill(tmp_path, {"c": {"4.png": picture(4), "5.txt": b""}})
    data = Folder(path=str(tmp_path), on_error="skip").load()
    assert data.problems == {"image that does not decode": 1, "file of another kind": 1}
    assert data.class_names == ["a", "b", "c"] and data.train.targets.tolist() == [0, 2]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no image and no \.wav file"):
        Folder(path=str(tmp_path)).load()


# Text tables ----------------------------------------------------------------------------------------------------------------------


def written(file, text):
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_text_tables_number_classes_in_their_natural_order(tmp_path):
    train = written(tmp_path / "a.csv", 'text,label\n"two\nlines, quoted",10\n\nplain,2\n')
    test = written(tmp_path / "b.tsv", "label\ttext\n2\tthree\n")
    data = Csv(path=train, test=test).load()
    assert data.class_names == ["2", "10"] and data.train.targets.tolist() == [1, 0] and data.test.targets.tolist() == [0]
    assert whole(data.train).inputs == {"text": ["two\nlines, quoted", "plain"]}
    assert data.modalities == {"text": Modality("text")} and data.test.ids.tolist() == [2]


def test_numeric_columns_and_lists_in_text_tables_are_vectors(tmp_path):
    table = written(tmp_path / "a.csv", "x,y,category\n1,2.5,a\n-3,1e2,b\n")
    assert whole(Csv(path=table).load().train).inputs["vector"].tolist() == [[1, 2.5], [-3, 100]]
    assert whole(Csv(path=table, features=["y"]).load().train).inputs["vector"].tolist() == [[2.5], [100]]
    lines = written(tmp_path / "a.jsonl", '{"v": [1, 2], "label": 0}\n\n{"v": [3, 4], "label": 1}\n')
    assert whole(Csv(path=lines).load().train).inputs["vector"].tolist() == [[1, 2], [3, 4]]


def test_image_paths_start_from_the_table(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.png").write_bytes(picture(5))
    table = written(tmp_path / "a.csv", "file,caption,label\nin/one.png,five,a\n")
    both = Csv(path=table, image="file", text="caption").load()
    batch = whole(both.train)
    assert batch.inputs["image"][0, 0, 0, 0] == 5 and batch.inputs["text"] == ["five"]
    assert set(both.modalities) == {"image", "text"}
    written(tmp_path / "a.csv", "file,label\nin/one.png,a\nin/two.png,a\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3: this is no image that can be read: .*two\.png: No such file"):
        Csv(path=table, image="file").load()


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.csv", "text,label\na,b\n", {"text": "txt"}, r"a\.csv: there is no 'txt' .*did you mean 'text'"),
        ("a.csv", "x,label\n1,a\nfoo,b\n", {"features": ["x"]}, r"a\.csv, line 3: 'foo' in column 'x' is no number"),
        ("a.csv", "x,label\n1,a\nfoo,b\n", {}, r"a\.csv, line 3: 'foo' in column 'x' is no number"),
        ("a.csv", "x,label\n1,a\nnan,b\n", {}, r"a\.csv, line 3: 'x' holds NaN"),
        ("a.csv", 'text,label\n"two\nlines",a\nb,\nc,\n', {}, r"a\.csv, line 4: the label is empty \(and 1 more such\)"),
        ("a.csv", "text,label\na\n", {}, r"a\.csv, line 2: there are 1 fields and 2 columns"),
        ("a.csv", "text,text\na,b\n", {}, r"a\.csv, line 1: two columns are called 'text'"),
        ("a.csv", "", {}, r"a\.csv, line 1: a header line"),
        ("a.csv", "text,label\n", {}, r"a\.csv: there is not a single record"),
        ("a.csv", "text,label\na,b\n", {"text": "label"}, r"'label' is the label and cannot be an input"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a", \n', {}, r"a\.jsonl, line 2: this is no JSON"),
        ("a.jsonl", '{"text": "a", "label": 1}\n[1]\n', {}, r"a\.jsonl, line 2: an object is needed"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', {}, r"a\.jsonl, line 2: the label is empty"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": 5, "label": 1}\n', {}, r"a\.jsonl, line 2: 'text' holds 5, and text is needed"),
        (
            "a.jsonl",
            '{"v": [1, 2], "label": 1}\n{"v": [1], "label": 1}\n',
            {},
            r"a\.jsonl, line 2: \[1\] in column 'v' is no list of 2 numbers",
        ),
        ("a.jsonl", '{"v": [], "label": 1}\n', {}, r"a\.jsonl, line 1: \[\] in column 'v' is no list of 1 numbers"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', {}, r"a\.jsonl, line 1: this is no JSON"),
        ("a.jsonl", '{"x": 1' + "0" * 400 + ', "label": 1}\n{"x": 2, "label": 1}\n', {"features": ["x"]}, r"a\.jsonl, line 1: 1000"),
        ("a.jsonl", "", {}, r"a\.jsonl: there is not a single record"),
    ],
)
def test_broken_text_tables_name_the_file_and_the_line(tmp_path, name, text, options, message):
    with pytest.raises((DataError, ConfigError), match=message):
        Csv(path=written(tmp_path / name, text), **options).load()


def test_a_test_label_that_training_lacks_is_told_with_what_was_probably_meant(tmp_path):
    train, test = written(tmp_path / "a.csv", "text,label\na,apple\n"), written(tmp_path / "b.csv", "text,label\na,aple\n")
    with pytest.raises(DataError, match=r"b\.csv, line 2: the label 'aple' is not in the training data: did you mean 'apple'"):
        Csv(path=train, test=test).load()


def test_bytes_that_are_no_text_name_the_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe,a\n")
    with pytest.raises(DataError, match=r"a\.csv, line \d: this cannot be read as a table"):
        Csv(path=str(tmp_path / "a.csv")).load()


@real_data
def test_banking77_is_read_by_its_usual_names():
    data = Csv(path="banking77-train.csv", test="banking77-test.csv").load()
    assert (len(data.train), len(data.test), len(data.class_names)) == (10003, 3080, 77)


# Arrays ---------------------------------------------------------------------------------------------------------------------------


def saved(file, **arrays):
    np.savez(file, **arrays)
    return str(file)


@pytest.mark.parametrize("shape", [(6, 5, 6, 3), (6, 3, 5, 6)])
def test_channels_are_found_first_or_last(tmp_path, shape):
    images = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    data = Arrays(path=saved(tmp_path / "a.npz", x=images, y=np.arange(6) % 2), test_fraction=0.5).load()
    assert data.modalities == {"image": Modality("image", (3, 5, 6), 255)}
    both = torch.cat([whole(data.train).inputs["image"], whole(data.test).inputs["image"]]).double().sum()
    assert both == images.sum() and data.test.ids.tolist() == list(range(len(data.train), 6))


def test_images_whose_channels_are_uncertain_need_a_layout(tmp_path):
    path = saved(tmp_path / "a.npz", x=np.zeros((2, 3, 5, 3), np.uint8), y=[0, 1])
    with pytest.raises(ConfigError, match="layout: nchw"):
        Arrays(path=path).load()
    assert Arrays(path=path, layout="nhwc").load().modalities["image"].shape == (3, 3, 5)


def test_arrays_by_modality_with_labels_of_text_and_their_test_part(tmp_path):
    arrays = {"x_train": np.zeros((2, 4, 4), np.uint8), "s_train": np.ones((2, 7)), "y_train": np.array(["b", "a"])}
    arrays |= {"x_test": np.zeros((1, 4, 4), np.uint8), "s_test": np.ones((1, 7)), "y_test": np.array(["b"])}
    data = Arrays(path=saved(tmp_path / "a.npz", **arrays), inputs={"image": "x_train", "audio": "s_train"}, target="y_train").load()
    assert data.modalities == {"image": Modality("image", (1, 4, 4), 255), "audio": Modality("audio", (7,))}
    assert data.class_names == ["a", "b"] and data.train.targets.tolist() == [1, 0] and data.test.targets.tolist() == [1]


def test_pairs_of_npy_files_and_class_names(tmp_path):
    for name, values in {"x": [[1.0], [2.0]], "y": [1, 0], "x_test": [[3.0]], "y_test": [1]}.items():
        np.save(tmp_path / f"{name}.npy", np.array(values))
    source = Arrays(path=str(tmp_path / "x.npy"), test=str(tmp_path / "x_test.npy"), class_names=["no", "yes"])
    data = source.load()
    assert data.class_names == ["no", "yes"] and data.train.targets.tolist() == [1, 0] and data.test.targets.tolist() == [1]
    assert whole(data.train).inputs["vector"].tolist() == [[1], [2]]
    assert [Path(file).name for file in source.files()] == ["x.npy", "y.npy", "x_test.npy", "y_test.npy"]


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": np.array([[0.0], [np.inf], [np.nan]]), "y": [0, 1, 1]}, {}, r"row 1: there are NaN or infinite values \(and 1 more such\)"),
        ({"x": np.zeros((3, 2)), "y": [0, 1]}, {}, r"'x' has the shape \(3, 2\) and 'y' has 2 rows"),
        ({"x": np.zeros((2, 2)), "z": [0, 1]}, {}, r"there is no 'y' \(target\)"),
        ({"x": np.zeros((2, 2)), "z": np.zeros((2, 2)), "y": [0, 1]}, {}, r"beside the target 'y' there are x, z"),
        ({"x": np.zeros((2, 2)), "y": [0, 2]}, {"class_names": ["a", "b"]}, r"row 1: the label '2' is not among the declared classes"),
        ({"x": np.array(["a", "b"]), "y": [0, 1]}, {"inputs": {"image": "x"}}, r"'x' holds text where image is expected"),
        ({"x": np.zeros((2, 2)), "y": [0, 1]}, {"inputs": {"text": "x"}}, r"'x' holds type float64 where text is expected"),
        ({"x": np.full((2, 4, 4), 300), "y": [0, 1]}, {}, r"row 0: a pixel is not from 0 to 255"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, {}, r"'y' is empty"),
        ({"x": np.array([{}, {}], dtype=object), "y": [0, 1]}, {}, r"the array 'x' cannot be read"),
    ],
)
def test_wrong_arrays_are_told_with_the_file(tmp_path, arrays, options, message):
    with pytest.raises((DataError, ConfigError), match=r"a\.npz.*" + message):
        Arrays(path=saved(tmp_path / "a.npz", **arrays), **options).load()


def test_a_file_that_is_no_npz_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"a\.npz: this is no \.npz file"):
        Arrays(path=written(tmp_path / "a.npz", "text")).load()


# torchvision ----------------------------------------------------------------------------------------------------------------------


def test_fake_data_needs_no_network():
    source = Torchvision(set="FakeData", options={"size": 20, "image_size": [3, 4, 4], "num_classes": 2}, decode="lazy", workers=0)
    data = source.load()
    assert len(data.train) + len(data.test) == 20 and data.class_names == ["0", "1"]
    assert data.train[torch.tensor([0])].inputs["image"].shape == (1, 3, 4, 4)


def test_a_set_that_torchvision_holds_in_memory_is_taken_whole(tmp_path):
    from torchvision.datasets import MNIST

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        images = np.arange(count * 784, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(np.array([2051, count, 28, 28], ">i4").tobytes() + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + bytes(range(5, 5 + count)))
    data = Torchvision(set="MNIST", root=str(tmp_path), download=False).load()
    assert data.class_names == MNIST.classes[5:8], "classes without a sample are left out"
    assert torch.equal(whole(data.train).inputs["image"].flatten(), torch.arange(3 * 784).to(torch.uint8))
    assert data.modalities == {"image": Modality("image", (1, 28, 28), 255)} and data.test.ids.tolist() == [3, 4]


def test_torchvision_sets_that_are_unknown_or_out_of_reach_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="torchvision has no set 'CIFAR1': did you mean 'CIFAR10"):
        Torchvision(set="CIFAR1").load()
    with pytest.raises(DataError, match="torchvision's CIFAR10 could not be had"):
        Torchvision(set="CIFAR10", root=str(tmp_path), download=False).load()
    with pytest.raises(ConfigError, match="FakeData refuses its options"):
        Torchvision(set="FakeData", options={"colour": 1}).load()


# Features -------------------------------------------------------------------------------------------------------------------------


class Doubling(Backbone):
    """Each image's pixels after the integer scale, times two; counts its passes."""

    passes = 0

    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = factor

    def build(self, info):
        self.dim = 64

    def forward(self, batch):
        type(self).passes += 1
        return batch.inputs["image"].flatten(1) * self.factor


def test_features_are_made_once_with_the_scale_of_a_run(tmp_path):
    Doubling.passes = 0
    state = torch.get_rng_state()
    data = Features(data=Digits(), backbone=Doubling(), batch=2000, cache=str(tmp_path)).load()
    raw = Digits().load()
    assert torch.equal(whole(data.train).inputs["vector"], whole(raw.train).inputs["image"].flatten(1) / 16 * 2)
    assert torch.equal(data.test.targets, raw.test.targets) and torch.equal(data.test.ids, raw.test.ids)
    assert (data.class_names, data.licence, data.modalities) == (raw.class_names, raw.licence, {"vector": Modality("vector", (64,))})
    assert torch.equal(torch.get_rng_state(), state)

    again = Features(data=Digits(), backbone=Doubling(), batch=100, cache=str(tmp_path)).load()
    assert Doubling.passes == 2, "a pass over the two parts, and none for the second load"
    assert torch.equal(whole(again.train).inputs["vector"], whole(data.train).inputs["vector"])


def test_other_settings_or_a_damaged_cache_make_the_features_anew(tmp_path):
    first = Features(data=Digits(), backbone=Doubling(), cache=str(tmp_path))
    key = first.key()
    first.load()
    assert first.key() == key, "building the backbone does not change the key"
    assert Features(data=Digits(), backbone=Doubling(3.0)).key() != key
    assert Features(data=Digits(split_seed=1), backbone=Doubling()).key() != key
    (tmp_path / f"{key}.safetensors").write_bytes(b"torn")
    Doubling.passes = 0
    assert len(Features(data=Digits(), backbone=Doubling(), cache=str(tmp_path)).load().train) == 1258
    assert Doubling.passes > 0


def test_features_notice_that_a_file_has_changed(tmp_path):
    path = written(tmp_path / "a.csv", "x,label\n1,a\n2,b\n")
    key = Features(data=Csv(path=path), backbone=Doubling()).key()
    assert Features(data=Csv(path=path), backbone=Doubling()).key() == key
    written(tmp_path / "a.csv", "x,label\n1,a\n2,b\n3,b\n")
    assert Features(data=Csv(path=path), backbone=Doubling()).key() != key


# Where data lies ------------------------------------------------------------------------------------------------------------------


def test_paths_are_looked_up_here_and_then_under_streamcl_data(tmp_path, monkeypatch):
    here, shared = tmp_path / "here", tmp_path / "shared"
    here.mkdir()
    shared.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("STREAMCL_DATA", str(shared))
    (shared / "digits.csv").touch()
    assert locate("digits.csv") == shared / "digits.csv"
    (here / "digits.csv").touch()
    assert locate("digits.csv") == here / "digits.csv"
    with pytest.raises(DataError, match=r"there is no 'digit\.csv' in .*here and .*shared; there is digits\.csv"):
        locate("digit.csv")
    monkeypatch.delenv("STREAMCL_DATA")
    with pytest.raises(DataError, match="STREAMCL_DATA, a second place to look in, is not set"):
        locate("other.npz")


def test_the_source_of_a_path_is_guessed_from_what_it_is(tmp_path):
    for name, source in {
        "a.csv": "csv",
        "a.tsv": "csv",
        "a.jsonl": "csv",
        "a.parquet": "parquet",
        "a.npz": "arrays",
        "x.npy": "arrays",
    }.items():
        (tmp_path / name).touch()
        assert source_for(tmp_path / name) == {"name": source, "path": str(tmp_path / name)}
    fill(tmp_path / "pictures", {"cat": {"1.PNG": b""}})
    assert source_for(tmp_path / "pictures")["name"] == "folder"
    fill(tmp_path / "tables", {"data": {"train-0.parquet": b""}})
    assert source_for(tmp_path / "tables")["name"] == "parquet"
    fill(tmp_path, {"saved": {"dataset_dict.json": b"{}"}})
    assert source_for(tmp_path / "saved")["name"] == "huggingface"
    (tmp_path / "a.xyz").touch()
    with pytest.raises(ConfigError, match=r"no source reads \.xyz; understood are \.csv, \.tsv"):
        source_for(tmp_path / "a.xyz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="a folder without a sub-folder"):
        source_for(tmp_path / "empty")
