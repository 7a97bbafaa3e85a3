"""The sources of published sets, on small files of their official form, and on the real ones where they are there."""

import io
import json
import os
import sys
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from streamcl.scenarios.sources.arff import Arff
from streamcl.scenarios.sources.av_folder import AvFolder
from streamcl.scenarios.sources.banking77 import Banking77
from streamcl.scenarios.sources.clinc150 import DOMAINS, Clinc150
from streamcl.scenarios.sources.coco import Coco
from streamcl.scenarios.sources.crema_d import CremaD
from streamcl.scenarios.sources.cub200 import Cub200
from streamcl.scenarios.sources.folder import Folder
from streamcl.scenarios.sources.food101_text import Food101Text
from streamcl.scenarios.sources.hateful_memes import HatefulMemes
from streamcl.scenarios.sources.image_list import ImageList
from streamcl.scenarios.sources.mm_imdb import GENRES, MmImdb
from streamcl.scenarios.sources.mosi import TEST, TRAIN, VALID, Mosi
from streamcl.scenarios.sources.omniglot import Omniglot
from streamcl.scenarios.sources.voc import CLASSES, Voc

from streamcl import config
from streamcl.data import FileDataset, whole
from streamcl.errors import ConfigError, DataError
from streamcl.stream import Modality

DATA = os.environ.get("STREAMCL_DATA")


def real(*names):
    there = DATA and all((Path(DATA) / name).exists() for name in names)
    return pytest.mark.skipif(not there, reason=f"{', '.join(names)} under STREAMCL_DATA are not there")


def picture(value, width=4, height=3, form="PNG"):
    stream = io.BytesIO()
    Image.new("L", (width, height), value).save(stream, form)
    return stream.getvalue()


def sound(samples, rate=100):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, dtype="<i2").tobytes())
    return stream.getvalue()


def put(place, content):
    place.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        place.write_bytes(content)
    else:
        place.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return place


def greys(dataset, modality="image"):
    """The grey value of each picture: JPEG keeps that of an even one."""
    return whole(dataset).inputs[modality].flatten(1)[:, 0].tolist()


# ARFF -----------------------------------------------------------------------------------------------------------------------------

XML = '<?xml version="1.0"?><labels xmlns="http://mulan.sourceforge.net/labels"><label name="sky"><label name="sea b"/></label></labels>'
HEAD = """% a comment
@RELATION 'small set'
@attribute width NUMERIC
@attribute "sea b" {0,1}
@attribute colour {red, 'light green', blue}
@attribute sky {0,1}
@attribute flag {0,1}

@DATA
"""


def mulan(file, **members):
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name.replace("__", "."), text)
    return file


def test_mulans_archive_gives_its_labels_in_the_order_of_the_attributes_and_its_own_split(tmp_path):
    train = HEAD + "1.5,1,'light green',0,1\n% between\n-2e0, 0 , red,1,0\n"
    test = HEAD + "{0 7, 2 blue}\n{1 1, 3 ?, 4 1}\n"
    path = mulan(tmp_path / "s.zip", **{"s-train__arff": train, "s-test__arff": test, "s__xml": XML})
    data = Arff(path=path).load()
    assert data.target == "labels" and data.class_names == ["sea b", "sky"] and data.train.targets.dtype == torch.int8
    assert data.train.targets.tolist() == [[1, 0], [0, 1]] and data.test.targets.tolist() == [[0, 0], [1, -1]]
    assert whole(data.train).inputs["vector"].tolist() == [[1.5, 0, 1, 0, 1], [-2, 1, 0, 0, 0]]
    # What a sparse row does not name is 0, or the first value of a nominal attribute.
    assert whole(data.test).inputs["vector"].tolist() == [[7, 0, 0, 1, 0], [0, 1, 0, 0, 1]]
    assert data.modalities == {"vector": Modality("vector", (5,))} and data.test.ids.tolist() == [2, 3]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(st.booleans(), st.floats(-1e6, 1e6, width=32)), min_size=4, max_size=4), min_size=1, max_size=6))
def test_a_sparse_row_says_what_the_dense_one_says(tmp_path_factory, rows):
    head = "@relation r\n" + "".join(f"@attribute a{i} numeric\n" for i in range(4)) + "@attribute class {x,y}\n@data\n"
    values = [[number if kept else 0.0 for kept, number in row] for row in rows]
    dense = head + "".join(",".join(map(repr, row)) + ",y\n" for row in values)
    sparse = head + "".join("{" + ", ".join([f"{i} {v!r}" for i, v in enumerate(row) if v] + ["4 y"]) + "}\n" for row in values)
    folder = tmp_path_factory.mktemp("arff")
    read = [Arff(path=put(folder / name, text)).load().train for name, text in (("d.arff", dense), ("s.arff", sparse))]
    assert whole(read[0]).inputs["vector"].tolist() == whole(read[1]).inputs["vector"].tolist() == np.float32(values).tolist()
    assert read[0].targets.tolist() == read[1].targets.tolist() == [1] * len(rows)


def test_a_plain_arff_file_has_one_class_and_a_part_of_every_class_can_be_held_back(tmp_path):
    head = "@relation r\n@attribute class {b,a}\n@attribute x real\n@attribute last {u,v,w}\n@data\n"
    file = put(tmp_path / "a.arff", head + "".join(f"{'ab'[n % 2]},{n},{'uvw'[n % 3]}\n" for n in range(12)))
    data = Arff(path=file, test_fraction=0.5).load()
    assert data.class_names == ["b", "a"] and data.target == "class"
    assert torch.bincount(data.train.targets).tolist() == torch.bincount(data.test.targets).tolist() == [3, 3]
    numbers = torch.cat([whole(part).inputs["vector"] for part in (data.train, data.test)])
    assert sorted(numbers[:, 0].tolist()) == list(range(12)) and numbers[:, 1:].sum(1).tolist() == [1] * 12
    assert Arff(path=file, label="last").load().class_names == ["u", "v", "w"]
    with pytest.raises(ConfigError, match=r"no nominal attribute is called 'clas' \(label\): did you mean 'class'"):
        Arff(path=file, label="clas").load()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,0,red,1", r"line 12: there are 4 values and 5 attributes"),
        ("wide,0,red,1,0", r"line 12: 'wide' in 'width' is no number"),
        ("1,0,green,1,0", r"line 12: 'green' is no value of 'colour': it takes red, light green, blue"),
        ("?,0,red,1,0", r"line 12: a value is missing"),
        ("{0 1, 9 1}", r"line 12: attribute 9 is named, and they run from 0 to 4"),
        ("{0 1", r"line 12: a sparse row must end with \}"),
    ],
)
def test_a_wrong_row_of_an_arff_file_is_named_or_left_out_and_counted(tmp_path, row, message):
    file, labels = put(tmp_path / "a.arff", HEAD + "1,0,red,1,0\n\n" + row + "\n2,1,blue,0,1\n"), put(tmp_path / "a.xml", XML)
    with pytest.raises(DataError, match=r"a\.arff, " + message):
        Arff(path=file, labels=labels).load()
    data = Arff(path=file, labels=labels, on_error="skip").load()
    assert data.train.targets.tolist() == [[0, 1], [1, 0]] and sum(data.problems.values()) == 1
    assert whole(data.train).inputs["vector"][:, 0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello\n", r"a\.arff, line 1: @relation, @attribute or @data is expected"),
        ("@relation r\n@data\n1\n", r"a\.arff: this is no ARFF file: it has no @attribute"),
        ("@relation r\n@attribute x complex\n@data\n", r"line 2: 'complex' is no type of ARFF"),
        ("@relation r\n@attribute x real\n@attribute x real\n@data\n", r"two attributes are called 'x'"),
        ("@relation r\n@attribute s string\n@attribute class {a}\n@data\nhi,a\n", r"the attribute 's' is text or a date"),
        ("@relation r\n@attribute class {a}\n@data\na\n", r"every attribute is a label"),
    ],
)
def test_a_file_that_is_no_arff_is_one_sentence(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        Arff(path=put(tmp_path / "a.arff", text)).load()


def test_labels_that_are_no_attributes_and_archives_of_another_form_are_refused(tmp_path):
    wrong = XML.replace('"sky"', '"skye"')
    path = mulan(tmp_path / "s.zip", **{"s-train__arff": HEAD + "1,0,red,1,0\n", "s__xml": wrong})
    with pytest.raises(DataError, match=r"s\.xml: .*has no attribute 'skye': did you mean 'sky'"):
        Arff(path=path).load()
    with pytest.raises(DataError, match=r"NAME-train\.arff, NAME-test\.arff and NAME\.xml are expected in it, and there is s\.xml"):
        Arff(path=mulan(tmp_path / "t.zip", **{"s__xml": XML})).load()
    with pytest.raises(DataError, match=r"u\.zip: this is no zip archive"):
        Arff(path=put(tmp_path / "u.zip", b"PK")).load()


@real("mulan-scene.zip", "mulan-yeast.zip")
def test_scene_and_yeast_have_their_published_sizes():
    for name, rows, labels, features, train in (("scene", 2407, 6, 294, 1211), ("yeast", 2417, 14, 103, 1500)):
        data = Arff(path=f"mulan-{name}.zip").load()
        assert (len(data.train), len(data.train) + len(data.test)) == (train, rows)
        assert data.train.targets.shape == (train, labels) and data.modalities["vector"].shape == (features,)
        with zipfile.ZipFile(Path(DATA) / f"mulan-{name}.zip") as archive:
            body = archive.read(f"{name}-train.arff").decode().partition("@data")[2].strip().splitlines()
        numbers = np.array([line.split(",") for line in body], dtype=np.float64)  # in both the labels are the last attributes
        assert np.array_equal(whole(data.train).inputs["vector"].numpy(), numbers[:, :-labels].astype(np.float32))
        assert np.array_equal(data.train.targets.numpy(), numbers[:, -labels:])


# Omniglot -------------------------------------------------------------------------------------------------------------------------


def drawings(file, alphabets, root="images_background_small1", drawers=20):
    with zipfile.ZipFile(file, "w") as archive:
        for (alphabet, characters), drawer in ((pair, d) for pair in alphabets.items() for d in range(1, drawers + 1)):
            for character in range(1, characters + 1):
                name = f"{root}/{alphabet}/character{character:02}/{character:04}_{drawer:02}.png"
                archive.writestr(name, picture(10 * character + drawer, 105, 105))
    return file


def test_omniglot_keeps_its_last_drawers_for_the_test_and_says_whose_a_drawing_is(tmp_path):
    data = Omniglot(path=drawings(tmp_path / "a.zip", {"Latin": 2, "Greek": 1}), size=5, test_drawers=3).load()
    assert data.class_names == ["Greek/character01", "Latin/character01", "Latin/character02"]
    assert torch.bincount(data.train.targets).tolist() == [17] * 3 and torch.bincount(data.test.targets).tolist() == [3] * 3
    alphabet, drawer = data.groupings["alphabet"], data.groupings["drawer"]
    assert alphabet.names == ["Greek", "Latin"] and alphabet.train.tolist() == [0] * 17 + [1] * 34
    assert sorted(set(drawer.test.tolist())) == [17, 18, 19] and drawer.names[17] == "18"
    assert data.modalities == {"image": Modality("image", (1, 5, 5), 255)}
    character = torch.tensor([1, 1, 2])[data.train.targets]
    assert greys(data.train) == (10 * character + drawer.train + 1).tolist()


def test_an_alphabet_in_two_archives_counts_once_and_a_folder_reads_like_its_archive(tmp_path):
    first = drawings(tmp_path / "a.zip", {"Latin": 1, "Greek": 1})
    second = drawings(tmp_path / "b.zip", {"Latin": 1, "Tifinagh": 1}, root="images_background_small2")
    both = Omniglot(path=[first, second], size=4).load()
    assert both.class_names == ["Greek/character01", "Latin/character01", "Tifinagh/character01"]
    assert len(both.train) + len(both.test) == 60
    with zipfile.ZipFile(first) as archive:
        archive.extractall(tmp_path / "unpacked")
    folder, packed = Omniglot(path=tmp_path / "unpacked", size=4).load(), Omniglot(path=first, size=4).load()
    assert torch.equal(whole(folder.train).inputs["image"], whole(packed.train).inputs["image"])


def test_a_drawing_that_does_not_decode_and_a_foreign_file_are_named_or_counted(tmp_path):
    path = drawings(tmp_path / "a.zip", {"Latin": 1})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("images_background_small1/Latin/character02/0002_01.png", b"text")
        archive.writestr("images_background_small1/Latin/readme.txt", b"text")
    with pytest.raises(DataError, match=r"a\.zip: .*0002_01\.png is no image that can be read"):
        Omniglot(path=path).load()
    data = Omniglot(path=path, on_error="skip").load()
    assert data.problems == {"image that does not decode": 1, "file of another kind": 1} and len(data.class_names) == 1
    with pytest.raises(ConfigError, match="test_drawers is 20, and there are 20 drawers"):
        Omniglot(path=path, test_drawers=20)
    with pytest.raises(DataError, match=r"b\.zip: there is no drawing"):
        Omniglot(path=mulan(tmp_path / "b.zip")).load()


@real("omniglot-small1.zip", "omniglot-small2.zip")
def test_the_small_omniglot_archives_have_twenty_drawings_of_each_character():
    data = Omniglot(path="omniglot-small1.zip").load()
    assert torch.bincount(data.train.targets).tolist() == [15] * 136 and torch.bincount(data.test.targets).tolist() == [5] * 136
    assert len(data.groupings["alphabet"].names) == 5
    both = Omniglot(path=["omniglot-small1.zip", "omniglot-small2.zip"], test_drawers=0).load()
    assert torch.bincount(both.train.targets).unique().tolist() == [20] and both.test is None
    assert set(data.class_names) < set(both.class_names)


# Intents --------------------------------------------------------------------------------------------------------------------------


def clinc(folder, **changes):
    lists = {
        "train": [["hello", "greeting"], ["pay it", "pay_bill"]],
        "val": [["hi", "greeting"]],
        "test": [["my bill", "pay_bill"]],
        "oos_train": [["why", "oos"]],
        "oos_val": [["how", "oos"]],
        "oos_test": [["who", "oos"]],
    }
    return put(folder / "data_full.json", lists | changes)


def test_clinc150_has_its_domains_and_its_texts_out_of_scope_as_an_option(tmp_path):
    data = Clinc150(path=clinc(tmp_path)).load()
    assert data.class_names == ["pay_bill", "greeting"] and whole(data.train).inputs["text"] == ["hello", "pay it", "hi"]
    domain = data.groupings["domain"]
    assert [domain.names[number] for number in domain.train.tolist()] == ["small_talk", "banking", "small_talk"]
    assert domain.names == list(DOMAINS) and domain.test.tolist() == [0]
    wide = Clinc150(path=clinc(tmp_path), out_of_scope=True, val="leave").load()
    assert wide.class_names[-1] == "oos" and wide.train.targets.tolist() == [1, 0, 2] and wide.test.targets.tolist() == [0, 2]
    assert wide.groupings["domain"].names[-1] == "out_of_scope" and wide.groupings["domain"].train.tolist() == [8, 0, 10]


def test_the_published_domains_are_ten_of_fifteen_different_intents():
    intents = [intent for its in DOMAINS.values() for intent in its.split()]
    assert [len(its.split()) for its in DOMAINS.values()] == [15] * 10 and len(set(intents)) == 150


def test_an_intent_that_the_table_lacks_leaves_the_domains_out_and_one_that_training_lacks_is_told(tmp_path):
    assert Clinc150(path=clinc(tmp_path, train=[["a", "other"], ["b", "greeting"]], test=[["c", "other"]])).load().groupings == {}
    with pytest.raises(DataError, match=r"data_full\.json, test\[0\]: the intent 'unseen' does not occur in training"):
        Clinc150(path=clinc(tmp_path, test=[["c", "unseen"]])).load()
    with pytest.raises(DataError, match=r"train\[1\]: a pair of a text and an intent is needed"):
        Clinc150(path=clinc(tmp_path, train=[["a", "greeting"], ["b"]])).load()
    skipped = Clinc150(path=clinc(tmp_path, train=[["a", "greeting"], ["b"], ["", "greeting"]]), on_error="skip").load()
    assert skipped.problems == {"record that is no pair of a text and an intent": 2, "intent that training lacks": 1}
    with pytest.raises(DataError, match=r"the list 'val' is missing"):
        Clinc150(path=put(tmp_path / "b.json", {"train": [], "test": []})).load()


@real("clinc150.json")
def test_tasks_of_fifteen_intents_in_the_given_order_are_the_domains_of_clinc150():
    scenario = config.load("protocols/domains_clinc150").scenario.build()
    scenario.open(0)
    assert [set(task.names[number] for number in task.classes) for task in scenario] == [set(its.split()) for its in DOMAINS.values()]


@real("clinc150.json")
def test_clinc150_has_its_published_size():
    data = Clinc150().load()
    assert len(data.class_names) == 150 and len(data.train) + len(data.test) == 22500
    assert torch.bincount(data.train.targets).unique().tolist() == [120] and torch.bincount(data.test.targets).unique().tolist() == [30]
    assert torch.bincount(data.groupings["domain"].test).tolist() == [450] * 10
    assert len(Clinc150(out_of_scope=True).load().test) == 5500


def test_a_row_of_banking77_that_is_not_complete_is_named_or_counted(tmp_path):
    train = put(tmp_path / "train.csv", 'text,category\n"where, now?",card_arrival\nwhy,\nhow,age_limit\n')
    test = put(tmp_path / "test.csv", "text,category\nwhen,age_limit\nwho,unseen\n")
    with pytest.raises(DataError, match=r"train\.csv, line 3: a text and a category are needed"):
        Banking77(path=train, test=test).load()
    data = Banking77(path=train, test=test, on_error="skip").load()
    assert data.class_names == ["age_limit", "card_arrival"] and data.test.targets.tolist() == [0]
    assert whole(data.train).inputs["text"] == ["where, now?", "how"]
    assert data.problems == {"row that is not complete": 1, "category that training lacks": 1}


@real("banking77-train.csv", "banking77-test.csv")
def test_banking77_has_its_published_size():
    data = Banking77().load()
    assert (len(data.class_names), len(data.train), len(data.test)) == (77, 10003, 3080)
    assert torch.bincount(data.test.targets).tolist() == [40] * 77


# Multi-label images ---------------------------------------------------------------------------------------------------------------


def coco(folder, annotations=()):
    categories = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
    for part in ("train2014", "val2014"):
        for number in (1, 2, 3):
            put(folder / part / f"COCO_{part}_{number:012}.jpg", picture(60 * number, form="JPEG"))
        images = [{"id": number, "file_name": f"COCO_{part}_{number:012}.jpg"} for number in (1, 2, 3)]
        things = [(1, 18, 0), (1, 18, 0), (1, 90, 0), (2, 3, 1), (2, 18, 0), *annotations]
        written = [{"image_id": i, "category_id": c, "iscrowd": crowd} for i, c, crowd in things]
        put(folder / f"annotations/instances_{part}.json", {"images": images, "annotations": written, "categories": categories})
    return folder


@pytest.mark.parametrize("decode", ["eager", "lazy"])
def test_coco_labels_an_image_with_what_is_annotated_in_it_but_not_with_crowds(tmp_path, decode):
    data = Coco(path=coco(tmp_path), decode=decode).load()
    assert data.class_names == ["car", "dog", "toothbrush"] and data.target == "labels"
    assert data.train.targets.tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0]] and data.train.targets.dtype == torch.int8
    assert isinstance(data.train, FileDataset) == (decode == "lazy") and greys(data.train) == [60, 120, 180]
    assert data.test.ids.tolist() == [3, 4, 5]
    assert Coco(path=tmp_path, crowd=True).load().train.targets.tolist()[1] == [1, 1, 0]


def test_coco_names_what_is_not_there(tmp_path):
    folder = coco(tmp_path, annotations=[(7, 18, 0)])
    with pytest.raises(DataError, match=r"instances_train2014\.json, annotations\[5\]: the image_id of a listed image"):
        Coco(path=folder).load()
    (folder / "train2014/COCO_train2014_000000000001.jpg").unlink()
    data = Coco(path=folder, on_error="skip").load()
    assert data.train.targets.tolist() == [[0, 1, 0], [0, 0, 0]] and len(data.test) == 3
    assert data.problems == {"image that is not there": 1, "annotation of an unknown image or category": 2}
    with pytest.raises(DataError, match=r"there is no annotations/instances_train2017\.json in it"):
        Coco(path=folder, year="2017").load()


def voc(folder):
    objects = {"000001": [("dog", 0), ("person", 1)], "000002": [("person", 1), ("person", 0)], "000003": [("car", 0)]}
    for name, things in objects.items():
        body = "".join(
            f"<object><name>{kind}</name><difficult>{hard}</difficult><part><name>head</name></part></object>" for kind, hard in things
        )
        put(folder / f"VOC2007/Annotations/{name}.xml", f"<annotation><filename>{name}.jpg</filename>{body}</annotation>")
        put(folder / f"VOC2007/JPEGImages/{name}.jpg", picture(40 * int(name), form="JPEG"))
    put(folder / "VOC2007/ImageSets/Main/trainval.txt", "000001\n000002\n")
    put(folder / "VOC2007/ImageSets/Main/test.txt", "000003\n")
    return folder


@pytest.mark.parametrize(("difficult", "person"), [("absent", 0), ("present", 1), ("unknown", -1)])
def test_a_difficult_object_of_voc_counts_as_asked(tmp_path, difficult, person):
    data = Voc(path=voc(tmp_path), difficult=difficult).load()
    expected = torch.zeros(2, 20, dtype=torch.int8)
    expected[0, CLASSES.index("dog")], expected[0, CLASSES.index("person")], expected[1, CLASSES.index("person")] = 1, person, 1
    assert torch.equal(data.train.targets, expected) and data.class_names == sorted(data.class_names) and len(data.class_names) == 20
    assert data.test.targets[0].nonzero().tolist() == [[CLASSES.index("car")]] and greys(data.test) == [120]


def test_an_annotation_of_voc_that_cannot_be_read_is_named_or_counted(tmp_path):
    folder = voc(tmp_path)
    put(folder / "VOC2007/Annotations/000002.xml", "<annotation><object><name>unicorn</name></object></annotation>")
    with pytest.raises(DataError, match=r"000002\.xml: this is no annotation of VOC: 'unicorn' is none of its 20 classes"):
        Voc(path=folder).load()
    put(folder / "VOC2007/Annotations/000002.xml", "<annotation>")
    put(folder / "VOC2007/ImageSets/Main/trainval.txt", "000001\n000002\n000009\n")
    data = Voc(path=folder / "VOC2007", on_error="skip").load()
    assert len(data.train) == 1 and data.problems == {"annotation that cannot be read": 1, "image that is not there": 1}


# Images of one class --------------------------------------------------------------------------------------------------------------


def cub(folder, count=4):
    names = [f"{1 + n // 2:03}.Bird_{n // 2}/Bird_{n}.jpg" for n in range(count)]
    put(folder / "classes.txt", "".join(f"{1 + c} {1 + c:03}.Bird_{c}\n" for c in range(count // 2)))
    put(folder / "images.txt", "".join(f"{n + 1} {name}\n" for n, name in enumerate(names)))
    put(folder / "image_class_labels.txt", "".join(f"{n + 1} {1 + n // 2}\n" for n in range(count)))
    put(folder / "train_test_split.txt", "".join(f"{n + 1} {1 - n % 2}\n" for n in range(count)))
    for n, name in enumerate(names):
        put(folder / "images" / name, picture(10 * n, form="JPEG"))
    return folder


def test_cub_is_split_as_its_files_say_and_session_lists_are_a_grouping(tmp_path):
    folder = cub(tmp_path / "CUB_200_2011", 24)
    data = Cub200(path=tmp_path).load()
    assert data.class_names[:2] == ["001.Bird_0", "002.Bird_1"] and len(data.class_names) == 12
    assert data.train.targets.tolist() == data.test.targets.tolist() == list(range(12))
    assert greys(data.train) == list(range(0, 240, 20)) and greys(data.test) == list(range(10, 240, 20))
    for number in (2, 10, 1):
        put(tmp_path / f"session_{number}.txt", f"CUB_200_2011/images/{number + 1:03}.Bird_{number}/Bird_{2 * number}.jpg\n")
    session = Cub200(path=folder, sessions=str(tmp_path / "session_*.txt")).load().groupings["session"]
    assert session.names == ["session_1", "session_2", "session_10", "unlisted"]
    expected = [3, 0, 1, 3, 3, 3, 3, 3, 3, 3, 2, 3]
    assert session.train.tolist() == session.test.tolist() == expected
    put(tmp_path / "session_2.txt", "CUB_200_2011/images/002.Bird_1/Bird_2.jpg\n")
    with pytest.raises(DataError, match=r"session_2\.txt, line 1: .*Bird_2\.jpg' is already in session_1\.txt"):
        Cub200(path=folder, sessions=str(tmp_path / "session_*.txt")).load()


def test_an_image_of_cub_without_a_class_or_a_file_is_named_or_counted(tmp_path):
    folder = cub(tmp_path, 8)
    (folder / "images/001.Bird_0/Bird_0.jpg").unlink()
    put(folder / "image_class_labels.txt", "1 1\n2 1\n3 2\n4 2\n5 9\n6 3\n7 4\n8 4\n")
    with pytest.raises(DataError, match=r"image 1 \(001\.Bird_0/Bird_0\.jpg\) is not there"):
        Cub200(path=folder).load()
    data = Cub200(path=folder, on_error="skip").load()
    assert data.train.targets.tolist() == [1, 3]
    assert data.problems == {"image that is not there": 1, "image without a class or a part": 1}


def test_miniimagenets_lists_number_classes_as_they_come_and_give_its_sessions(tmp_path):
    for n in range(4):
        put(tmp_path / "images" / f"n0{n}.jpg", picture(30 * n, form="JPEG"))
    train = put(tmp_path / "split/train.csv", "filename,label\nn00.jpg,n9\nn01.jpg,n1\nn02.jpg,n9\n")
    test = put(tmp_path / "split/test.csv", "filename,label\nn03.jpg,n1\n")
    put(tmp_path / "lists/session_1.txt", "MINI-ImageNet/train/n9/n00.jpg\nMINI-ImageNet/train/n9/n02.jpg\n")
    put(tmp_path / "lists/session_2.txt", "MINI-ImageNet/train/n1/n01.jpg\n")
    data = ImageList(path=tmp_path / "images", train=train, test=test, sessions=str(tmp_path / "lists/session_*.txt")).load()
    assert data.class_names == ["n9", "n1"] and data.train.targets.tolist() == [0, 1, 0] and data.test.targets.tolist() == [1]
    assert data.groupings["session"].train.tolist() == [0, 1, 0] and greys(data.test) == [90]
    assert data.groupings["session"].test.tolist() == [1]
    # A list fixes the shots of its classes: the other image of n9 is left out, and n1, which no list names any more, keeps its own.
    put(tmp_path / "lists/session_1.txt", "MINI-ImageNet/train/n9/n02.jpg\n")
    (tmp_path / "lists/session_2.txt").unlink()
    fixed = ImageList(path=tmp_path / "images", train=train, test=test, sessions=str(tmp_path / "lists/session_*.txt")).load()
    assert fixed.train.targets.tolist() == [1, 0] and greys(fixed.train) == [30, 60]
    assert fixed.groupings["session"].train.tolist() == [1, 0] and fixed.groupings["session"].test.tolist() == [1]
    put(tmp_path / "lists/session_3.txt", "MINI-ImageNet/train/n1/n03.jpg\n")
    with pytest.raises(DataError, match=r"session_3\.txt, line 1: .* is no training image"):
        ImageList(path=tmp_path / "images", train=train, test=test, sessions=str(tmp_path / "lists/session_*.txt")).load()


def test_a_list_names_a_label_behind_the_path_or_the_folder_is_the_class(tmp_path):
    for name in ("a/1.jpg", "b/1.jpg", "b/2 2.jpg"):
        put(tmp_path / name, picture(50, form="JPEG"))
    numbered = put(tmp_path / "train.txt", "a/1.jpg 5\nb/2 2.jpg 7\n")
    plain = put(tmp_path / "plain.txt", "./b/1.jpg\na/1.jpg\n")
    assert ImageList(path=tmp_path, train=numbered, test=numbered).load().class_names == ["5", "7"]
    assert ImageList(path=tmp_path, train=plain, test=plain).load().class_names == ["b", "a"]
    with pytest.raises(DataError, match=r"plain\.txt, line 1: the class 'b' does not occur in training"):
        ImageList(path=tmp_path, train=numbered, test=plain).load()
    put(tmp_path / "plain.txt", "b/1.jpg\nb/9.jpg\n1.jpg\n")
    data = ImageList(path=tmp_path, train=plain, test=plain, on_error="skip").load()
    assert data.problems == {"image that is not there": 2, "line that is not complete": 2} and len(data.train) == 1


def test_the_folder_source_reads_the_form_of_the_pre_trained_benchmarks(tmp_path):
    for part, value in (("train", 30), ("test", 60)):
        for name in ("n01443537", "n01484850"):
            put(tmp_path / "imagenet-r" / part / name / "art_0.JPEG", picture(value, form="JPEG"))
    data = Folder(path=tmp_path / "imagenet-r").load()
    assert data.class_names == ["n01443537", "n01484850"] and greys(data.train) == [30, 30] and greys(data.test) == [60, 60]


# Images with texts ----------------------------------------------------------------------------------------------------------------


def test_hateful_memes_are_an_image_and_a_text_and_need_a_label(tmp_path):
    for n in (1, 2, 3):
        put(tmp_path / f"img/{n}.png", picture(n))
    lines = [{"id": n, "img": f"img/{n}.png", "label": n % 2, "text": f"text {n}"} for n in (1, 2)]
    put(tmp_path / "train.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    put(tmp_path / "test_seen.jsonl", json.dumps({"img": "img/3.png", "label": 1, "text": "three"}))
    data = HatefulMemes(path=tmp_path).load()
    batch = whole(data.train)
    assert batch.target.tolist() == [1, 0] and batch.inputs["text"] == ["text 1", "text 2"] and greys(data.train) == [1, 2]
    assert set(data.modalities) == {"image", "text"} and data.class_names == ["not hateful", "hateful"]
    put(tmp_path / "test.jsonl", '{"img": "img/3.png", "text": "three"}\nno json\n{"img": "img/9.png", "label": 0, "text": "x"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl, line 1: the label is None, and 0 or 1 is needed"):
        HatefulMemes(path=tmp_path, test="test.jsonl").load()
    put(tmp_path / "train.jsonl", (tmp_path / "train.jsonl").read_text() + (tmp_path / "test.jsonl").read_text())
    problems = HatefulMemes(path=tmp_path, on_error="skip").load().problems
    assert problems == {"meme without a label": 1, "line that is not complete": 1, "image that is not there": 1}


def films(folder, records):
    for name, record in records.items():
        put(folder / f"dataset/{name}.json", record)
        put(folder / f"dataset/{name}.jpeg", picture(int(name), form="JPEG"))
    return folder


def test_mm_imdb_has_the_23_genres_and_masks_a_film_without_a_plot(tmp_path):
    films(
        tmp_path,
        {
            "10": {"plot": ["short", "a longer plot"], "genres": ["Film-Noir", "Drama", "News"]},
            "20": {"plot": [], "genres": ["Adult"]},
            "30": {"plot": "one", "genres": ["Short"]},
            "40": {"plot": ["dev"], "genres": ["War"]},
        },
    )
    put(tmp_path / "split.json", {"train": ["10", "20"], "dev": ["40"], "test": ["30"]})
    data = MmImdb(path=tmp_path).load()
    assert len(data.class_names) == 23 and data.target == "labels"
    positive = [[GENRES[column] for column in row.nonzero().flatten().tolist()] for row in data.train.targets]
    assert positive == [["Drama", "Film-Noir"], []] and data.test.targets[0].sum() == 1
    batch = whole(data.train)
    assert batch.inputs["text"] == ["short", ""] and batch.present["text"].tolist() == [True, False]
    assert whole(MmImdb(path=tmp_path, plot="longest", dev="train").load().train).inputs["text"] == ["a longer plot", "", "dev"]
    put(tmp_path / "split.json", {"train": ["10", "50"], "test": ["30"]})
    with pytest.raises(DataError, match=r"split\.json lists 50, and there is no .*50\.json"):
        MmImdb(path=tmp_path).load()
    put(tmp_path / "dataset/10.json", {"plot": "\ud800", "genres": []})
    with pytest.raises(DataError, match=r"10\.json: this is no JSON"):
        MmImdb(path=tmp_path).load()
    put(tmp_path / "split.json", {"train": ["10", "20", "50"], "test": ["30"]})
    assert MmImdb(path=tmp_path, on_error="skip").load().problems == {"record that cannot be read": 1, "film that is not there": 1}


def dishes(folder):
    for part, name in (("train", "apple_pie_0"), ("train", "beet_salad_1"), ("train", "apple_pie_2"), ("test", "beet_salad_3")):
        put(folder / "images" / part / name.rpartition("_")[0] / f"{name}.jpg", picture(20 * int(name[-1]), form="JPEG"))
    return folder


def test_food101_is_read_from_its_titles_or_from_the_splits_of_the_missing_modality_protocols(tmp_path):
    folder = dishes(tmp_path)
    put(folder / "texts/train_titles.csv", 'apple_pie_0.jpg,"Pie, with apples",apple_pie\nbeet_salad_1.jpg,Salad,beet_salad\n')
    put(folder / "texts/test_titles.csv", "beet_salad_3.jpg,,beet_salad\n")
    data = Food101Text(path=folder).load()
    assert data.class_names == ["apple_pie", "beet_salad"] and whole(data.train).inputs["text"] == ["Pie, with apples", "Salad"]
    assert whole(data.test).present["text"].tolist() == [False] and greys(data.test) == [60]
    put(folder / "text.json", {"apple_pie_0.jpg": "pie", "beet_salad_1.jpg": "salad", "beet_salad_3.jpg": "more"})
    put(folder / "split.json", {"train": ["apple_pie_0.jpg", "beet_salad_1.jpg"], "val": ["apple_pie_2.jpg"], "test": ["beet_salad_3.jpg"]})
    left = Food101Text(path=folder).load()
    assert left.train.targets.tolist() == [0, 1] and whole(left.train).present is None
    joined = whole(Food101Text(path=folder, val="train").load().train)
    assert joined.inputs["text"] == ["pie", "salad", ""] and joined.present["text"].tolist() == [True, True, False]
    put(folder / "split.json", {"train": ["apple_pie_0.jpg", "apple_pie_9.jpg"], "test": ["beet_salad_3.jpg"]})
    with pytest.raises(DataError, match=r"split\.json: apple_pie_9\.jpg: there is no .*apple_pie_9\.jpg"):
        Food101Text(path=folder).load()
    with pytest.raises(DataError, match=r"split\.json: beet_salad_3\.jpg: the class 'beet_salad' does not occur in training"):
        put(folder / "split.json", {"train": ["apple_pie_0.jpg"], "test": ["beet_salad_3.jpg"]})
        Food101Text(path=folder).load()


# Sound and sight ------------------------------------------------------------------------------------------------------------------


def crema(folder, names, frames=3):
    for number, name in enumerate(names, 1):
        put(folder / f"AudioWAV/{name}.wav", sound([number, -number]))
        for frame in range(frames):
            put(folder / f"Image-01-FPS/{name}/{frame:05}.jpg", picture(10 * number + frame, form="JPEG"))
    return folder


CLIPS = ["1001_DFA_ANG_XX", "1001_IEO_NEU_XX", "1002_DFA_HAP_XX", "1003_DFA_SAD_LO", "1004_DFA_ANG_XX", "1005_DFA_ANG_XX"]


def test_crema_d_takes_emotions_from_the_names_and_keeps_actors_apart(tmp_path):
    data = CremaD(path=crema(tmp_path, CLIPS), test_actors=0.4).load()
    assert data.class_names == ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"]
    actor = data.groupings["actor"]
    assert actor.names == ["1001", "1002", "1003", "1004", "1005"] and data.groupings["sentence"].names == ["DFA", "IEO"]
    assert not set(actor.train.tolist()) & set(actor.test.tolist()) and len(set(actor.test.tolist())) == 2
    batches = [whole(part) for part in (data.train, data.test)]
    number = torch.cat([batch.inputs["audio"][:, 0] * 32768 for batch in batches]).long()
    emotion = torch.tensor([data.class_names.index(name.split("_")[2]) for name in CLIPS])
    assert torch.equal(torch.cat([batch.target for batch in batches]), emotion[number - 1])
    # Of the three frames the middle one is taken.
    assert torch.equal(torch.cat([batch.inputs["image"][:, 0, 0, 0] for batch in batches]).long(), 10 * number + 1)
    assert data.modalities == {"audio": Modality("audio", (2,)), "image": Modality("image", (3, 3, 4), 255)}


@pytest.mark.parametrize("decode", ["eager", "lazy"])
def test_frames_of_a_clip_are_a_video_and_lists_say_the_split(tmp_path, decode):
    folder = crema(tmp_path, CLIPS[:3], frames=5)
    lists = {
        "train": put(tmp_path / "train.csv", "1001_IEO_NEU_XX,NEU\n1001_DFA_ANG_XX,ANG\n"),
        "test": put(tmp_path / "test.csv", CLIPS[2]),
    }
    data = CremaD(path=folder, frames=3, decode=decode, workers=0, **lists).load()
    assert data.modalities["video"] == Modality("video", (3, 3, 3, 4), 255)
    assert whole(data.train).inputs["video"][:, :, 0, 0, 0].tolist() == [[20, 22, 24], [10, 12, 14]]
    assert data.train.targets.tolist() == [0, 5] and data.test.targets.tolist() == [1]
    read = list(CremaD(path=folder, frames=3, decode=decode, workers=2, **lists).load().train.batches(1))
    assert [batch.inputs["video"][0, :, 0, 0, 0].tolist() for batch in read] == [[20, 22, 24], [10, 12, 14]]
    with pytest.raises(ConfigError, match="give both, or neither"):
        CremaD(path=folder, train=lists["train"])


def test_a_clip_without_frames_or_without_an_emotion_is_named_or_counted(tmp_path):
    folder = crema(tmp_path, [*CLIPS, "1006_DFA_XYZ_XX", "1007_DFA_ANG_XX", "1008_DFA_ANG_XX"])
    for frame in (folder / "Image-01-FPS/1007_DFA_ANG_XX").iterdir():
        frame.write_bytes(b"text")
    with pytest.raises(DataError, match=r"1006_DFA_XYZ_XX\.wav: ACTOR_SENTENCE_EMOTION_LEVEL is expected"):
        CremaD(path=folder, test_actors=0).load()
    for frame in list((folder / "Image-01-FPS/1008_DFA_ANG_XX").iterdir()):
        frame.unlink()
    (folder / "Image-01-FPS/1008_DFA_ANG_XX").rmdir()
    for frames, kind in ((1, "image"), (2, "video")):
        data = CremaD(path=folder, test_actors=0, on_error="skip", frames=frames).load()
        assert data.problems == {"clip without an emotion": 1, "clip that is not there": 1, f"{kind} that does not decode": 1}
        assert len(data.train) == len(data.groupings["actor"].train) == 6 and data.test is None


def test_clips_in_lists_are_found_by_their_names_and_numbered_classes_get_theirs(tmp_path):
    for part, name, value in (("train", "-a_1", 10), ("train", "b", 20), ("test", "c", 30)):
        put(tmp_path / f"audio/{part}/{name}.wav", sound([value]))
        put(tmp_path / f"frames/{part}/{name}/1.jpg", picture(value, form="JPEG"))
    lists = {"train": put(tmp_path / "my_train.txt", "-a_1,10,1\nb,10,0\n"), "test": put(tmp_path / "my_test.txt", "c,10,1\n")}
    places = {"audio_in": "audio/{part}", "frames_in": "frames/{part}"}
    data = AvFolder(path=tmp_path, **lists, **places).load()
    assert data.class_names == ["0", "1"] and data.train.targets.tolist() == [1, 0] and greys(data.train) == [10, 20]
    named = AvFolder(path=tmp_path, **lists, **places, classes=put(tmp_path / "stat.csv", "drum\nflute\n")).load()
    assert named.class_names == ["drum", "flute"] and named.test.targets.tolist() == [1] and greys(named.test) == [30]
    put(tmp_path / "my_test.txt", "c,10,1\nc,10,2\nd,10,1\nc\n")
    with pytest.raises(DataError, match=r"my_test\.txt, line 3: there is no .*d\.wav"):
        AvFolder(path=tmp_path, **lists, **places).load()
    problems = AvFolder(path=tmp_path, **lists, **places, on_error="skip").load().problems
    assert problems == {"clip of an unknown class": 1, "clip that is not there": 1, "line that is not complete": 1}


# CMU-MOSI -------------------------------------------------------------------------------------------------------------------------

NAMES = {
    "words": "CMU_MOSI_TimestampedWords.csd",
    "vectors": "CMU_MOSI_TimestampedWordVectors.csd",
    "audio": "CMU_MOSI_COVAREP.csd",
    "video": "CMU_MOSI_Visual_Facet_42.csd",
    "labels": "CMU_MOSI_Opinion_Labels.csd",
}


def csd(file, videos):
    h5py = pytest.importorskip("h5py")
    with h5py.File(file, "w") as out:
        root = out.create_group(file.stem)
        root.create_group("metadata")
        for video, (intervals, features) in videos.items():
            entry = root.create_group("data").create_group(video) if "data" not in root else root["data"].create_group(video)
            entry.create_dataset("intervals", data=np.array(intervals, dtype=np.float64))
            entry.create_dataset("features", data=np.array(features))


def mosi(folder, **changes):
    times = [[0, 1], [1, 2], [2, 3], [3, 4]]
    said = [[b"good"], [b"sp"], [b"film"], [b"bad"]]
    content = {
        "words": {video: (times, said) for video in (TRAIN[0], VALID[0], TEST[0])},
        "vectors": {video: (times, [[1.0, 1], [0, 0], [3, 3], [4, 4]]) for video in (TRAIN[0], VALID[0], TEST[0])},
        "audio": {
            video: ([[0, 0.5], [0.5, 1.5], [2.2, 2.4], [3, 4]], [[2.0], [4], [-np.inf], [8]]) for video in (TRAIN[0], VALID[0], TEST[0])
        },
        "video": {TRAIN[0]: ([[3, 4]], [[5.0, 6, 7]]), TEST[0]: ([[0, 4]], [[1.0, 1, 1]])},
        "labels": {
            TRAIN[0]: ([[0, 3], [3, 4]], [[1.5], [-3.0]]),
            VALID[0]: ([[0, 4]], [[0.5]]),
            TEST[0]: ([[0, 4]], [[2.0]]),
        },
    } | changes
    for kind, videos in content.items():
        csd(folder / NAMES[kind], videos)
    return folder


def test_mosi_averages_frames_over_the_words_and_masks_what_is_absent(tmp_path):
    data = Mosi(path=mosi(tmp_path), length=3).load()
    assert data.target == "value" and data.train.targets.tolist() == [1.5, -3.0] and data.test.targets.tolist() == [2.0]
    batch = whole(data.train)
    # Words good and film, without the pause between; the third step is padding. Sound: 2 and 4 overlap good, -inf counts as 0.
    assert batch.inputs["text"].tolist() == [[[1, 1], [3, 3], [0, 0]], [[4, 4], [0, 0], [0, 0]]]
    assert batch.inputs["audio"].tolist() == [[[3], [0], [0]], [[8], [0], [0]]]
    assert batch.present["video"].tolist() == [False, True] and bool(batch.inputs["video"][0].isnan().all())
    assert batch.inputs["video"][1].tolist() == [[5, 6, 7], [0, 0, 0], [0, 0, 0]]
    assert data.problems == {"value of audio that is not finite, set to 0": 2}  # one in training, one in the test set
    assert data.groupings["video"].names == [TRAIN[0], VALID[0], TEST[0]] and data.groupings["video"].test.tolist() == [2]
    assert data.modalities["video"] == Modality("vector", (3, 3))


def test_mosi_gives_words_and_its_second_fold_as_options(tmp_path):
    data = Mosi(path=mosi(tmp_path), text="words", valid="train", length=2).load()
    assert whole(data.train).inputs["text"] == ["good film", "bad", "good film"] and data.train.targets.tolist() == [1.5, -3, 0.5]
    assert data.modalities["text"] == Modality("text")


def test_the_folds_of_mosi_are_93_different_videos():
    assert (len(TRAIN), len(VALID), len(TEST)) == (52, 10, 31) and len({*TRAIN, *VALID, *TEST}) == 93


def test_mosi_refuses_pickles_and_names_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"aligned_50\.pkl is a pickled release"):
        Mosi(path=tmp_path / "aligned_50.pkl")
    put(tmp_path / "only/mosi.pkl", b"")
    with pytest.raises(DataError, match=r"there is no CMU_MOSI_Opinion_Labels\.csd.*; the pickled releases are not read"):
        Mosi(path=tmp_path / "only").load()
    empty = {TRAIN[0]: ([[0, 3], [9, 10]], [[1.5], [np.nan]]), TEST[0]: ([[0, 4]], [[2.0]])}
    folder = mosi(tmp_path, labels=empty)
    with pytest.raises(DataError, match=rf"{TRAIN[0]}, segment 1 has the label nan"):
        Mosi(path=folder).load()
    assert Mosi(path=folder, on_error="skip").load().problems["segment without a word or a label"] == 1
    csd(tmp_path / NAMES["audio"], {TRAIN[0]: ([[0, 4]], [[1.0, 2]]), TEST[0]: ([[0, 4]], [[1.0]])})
    with pytest.raises(DataError, match=rf"COVAREP\.csd: {TEST[0]} needs features \(rows, 2\) and as many intervals"):
        Mosi(path=folder, on_error="skip").load()
    put(tmp_path / NAMES["audio"], b"text")
    with pytest.raises(DataError, match=r"CMU_MOSI_COVAREP\.csd: this is no HDF5 file"):
        Mosi(path=folder).load()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"needs h5py: pip install 'streamcl\[media\]'"):
        Mosi(path=folder).load()


# The published protocols ----------------------------------------------------------------------------------------------------------

PROTOCOLS = sorted((Path(__file__).parents[1] / "configs/protocols").glob("*.yaml"))


@pytest.mark.parametrize("file", [file for file in PROTOCOLS if file.name != "pilot.yaml"], ids=lambda file: file.stem)
def test_a_protocols_configuration_finds_its_set_under_streamcl_data(file, tmp_path, monkeypatch):
    def paths(data):
        return {key: data[key] for key in ("path", "train", "test") if key in data} if isinstance(data, dict) else {}

    parts = [
        yaml.safe_load(part.read_text())
        for part in (file, *(file.parent / name for name in [yaml.safe_load(file.read_text()).get("extends")] if name))
    ]
    data = next(part["scenario"]["data"] for part in parts if "data" in part["scenario"])
    for name in paths(data).values():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch() if Path(name).suffix else (tmp_path / name).mkdir(exist_ok=True)
    monkeypatch.setenv("STREAMCL_DATA", str(tmp_path))
    options = config.load(file).scenario.options["data"].options
    assert {key: str(options[key]) for key in paths(data)} == {key: str(tmp_path / name) for key, name in paths(data).items()}
    assert file.read_text().startswith("# ") and config.load(file).scenario.build() is not None
