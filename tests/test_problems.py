"""Problems with verifiable answers: every usual form of a row gives the same question, and what is wrong names its row."""

import base64
import io
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from streamcl.scenarios.reasoning import Reasoning
from streamcl.scenarios.sources.problems import Problems

from streamcl.data import FileDataset, whole
from streamcl.errors import ConfigError, DataError


def picture(value, width=4, height=3):
    """A PNG of one grey value, as bytes."""
    stream = io.BytesIO()
    Image.new("L", (width, height), value).save(stream, "PNG")
    return stream.getvalue()


def lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def column(dataset, name):
    return whole(dataset).extra[name]


def test_rows_of_all_usual_forms_become_the_same_question(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(7))
    data_uri = "data:image/png;base64," + base64.b64encode(picture(7)).decode()
    forms = [
        {"problem": "<image>How many?", "image": "a.png", "answer": "3"},
        {"question": "How many?\n<image>", "images": ["a.png"], "solution": "<think>1+2</think><answer>3</answer>"},
        {"query": " How many? ", "image_path": data_uri, "ground_truth": 3},
        {"prompt": [{"role": "user", "content": "<image>How many?"}], "images": [{"path": "a.png"}], "reward_model": {"ground_truth": "3"}},
        {
            "prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How many?"}]}],
            "answer": r"so \boxed{3}",
        },
    ]
    for place, form in enumerate(forms):
        batch = whole(Problems(path=lines(tmp_path / f"{place}.jsonl", form)).load().train)
        assert batch.inputs["text"] == ["How many?"] and batch.extra["answer"] == ["3"] and batch.extra["verifier"] == ["number"], form
        assert batch.inputs["image"].shape == (1, 3, 3, 4) and bool((batch.inputs["image"] == 7).all()) and batch.present is None
        assert batch.target.tolist() == [0] and batch.extra["skill"] == ["all"] and "difficulty" not in batch.extra


def test_parquet_with_embedded_pictures_and_a_row_without_one(tmp_path):
    table = pa.table(
        {
            "problem": ["<image>one?", "two?", "<image><image>three?"],
            "images": [
                [{"bytes": picture(1), "path": None}],
                [],
                [{"bytes": picture(3), "path": None}, {"bytes": picture(4), "path": None}],
            ],
            "answer": ["A", "many words", "50%"],
            "data_source": ["math", "chat", "math"],
            "pass_rate": [0.25, 1.0, None],
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    source = Problems(path=tmp_path / "train.parquet")
    data = source.load()
    batch = whole(data.train)
    assert batch.inputs["text"] == ["one?", "two?", "three?"]
    assert batch.present["image"].tolist() == [True, False, True] and batch.inputs["image"][:, 0, 0, 0].tolist() == [1, 0, 3]
    assert data.class_names == ["chat", "math"] and batch.target.tolist() == [1, 0, 1] and data.target == "text"
    assert batch.extra["verifier"] == ["choice", "text", "number"]
    assert batch.extra["difficulty"][:2].tolist() == [0.75, 0] and math.isnan(batch.extra["difficulty"][2])
    assert data.problems == {"question with further pictures, of which only the first is used": 1}
    assert source.files() == [str(tmp_path / "train.parquet")]


def test_lazy_rows_are_the_eager_ones_and_keep_their_masks(tmp_path):
    rows = [{"problem": f"q{n}", "answer": str(n), "image": None if n == 2 else f"{n}.png"} for n in range(5)]
    for n in range(5):
        (tmp_path / f"{n}.png").write_bytes(picture(n + 1, *((4, 3) if n else (8, 8))))
    path = lines(tmp_path / "a.jsonl", *rows)
    eager, lazy = (
        Problems(path=path, size=4, decode=decode, workers=workers).load().train for decode, workers in (("eager", 1), ("lazy", 2))
    )
    assert isinstance(lazy, FileDataset)
    order = torch.tensor([4, 2, 0])
    for one, other in ((eager[order], lazy[order]), (whole(eager), next(lazy.batches(5)))):
        assert torch.equal(one.inputs["image"], other.inputs["image"]) and torch.equal(one.present["image"], other.present["image"])
        assert one.extra == other.extra and one.inputs["text"] == other.inputs["text"]
    assert eager[order].present["image"].tolist() == [True, False, True] and eager[order].inputs["image"][1].sum() == 0


def test_the_verifier_is_the_one_asked_for_the_one_named_or_the_one_that_fits(tmp_path):
    rows = [
        {"problem": "a", "answer": "B", "options": ["A. red", "B. blue"]},
        {"problem": "b", "answer": "blue", "options": {"A": "red", "B": "blue"}},
        {"problem": "c", "answer": "<answer>12</answer>", "problem_type": "OCR"},
        {"problem": "d", "answer": "1/2", "problem_type": "something new"},
        {"problem": "e", "answer": "yes", "verifier": "exact"},
        {"problem": "f", "answer": "many", "problem_type": "numerical"},
    ]
    data = Problems(path=lines(tmp_path / "a.jsonl", *rows)).load()
    assert column(data.train, "verifier") == ["choice", "choice", "text", "number", "exact", "number"]
    assert column(data.train, "choices") == ["A. red\nB. blue", "A. red\nB. blue", "", "", "", ""]
    assert data.problems == {"right answer that its verifier cannot read (kept, not scored)": 1}
    assert data.modalities.keys() == {"text"}
    every = Problems(path=str(tmp_path / "a.jsonl"), verifier="text").load()
    assert set(column(every.train, "verifier")) == {"text"}
    with pytest.raises(ConfigError, match="unknown verifier 'txt': did you mean 'text'"):
        Problems(path=str(tmp_path / "a.jsonl"), verifier="txt")


def test_difficulties_are_numbers_levels_and_words(tmp_path):
    rows = [{"problem": "a", "answer": "1", "level": level} for level in (2, "Level 5", "easy", "Hard", None, "1.5")]
    path = lines(tmp_path / "a.jsonl", *rows)
    got = column(Problems(path=path).load().train, "difficulty").tolist()
    assert got[:4] == [2, 5, 1, 3] and math.isnan(got[4]) and got[5] == 1.5
    assert column(Problems(path=path, pass_rate="level", on_error="skip").load().train, "difficulty")[0] == -1


def test_columns_are_named_by_options_and_a_field_that_only_later_rows_have_is_found(tmp_path):
    rows = [{"ask": "a", "info": {"gold": "1", "kind": "x"}}, {"ask": "b", "info": {"gold": "2", "kind": "y"}, "hardness": 4}]
    data = Problems(
        path=lines(tmp_path / "a.jsonl", *rows), question="ask", answer="info.gold", skill="info.kind", difficulty="hardness"
    ).load()
    assert data.class_names == ["x", "y"] and column(data.train, "answer") == ["1", "2"] and column(data.train, "difficulty")[1] == 4


def test_a_share_of_every_skill_is_held_back_and_ids_stay_apart(tmp_path):
    rows = [{"problem": f"q{n}", "answer": "1", "skill": "ab"[n % 2]} for n in range(20)]
    path = lines(tmp_path / "a.jsonl", *rows)
    data = Problems(path=path, test_fraction=0.3).load()
    assert sorted(whole(data.train).inputs["text"] + whole(data.test).inputs["text"]) == sorted(f"q{n}" for n in range(20))
    assert torch.bincount(data.test.targets).tolist() == [3, 3]
    assert not set(data.train.ids.tolist()) & set(data.test.ids.tolist())
    again = Problems(path=path, test_fraction=0.3).load()
    assert whole(again.test).inputs["text"] == whole(data.test).inputs["text"]
    own = Problems(path=path, test=lines(tmp_path / "b.jsonl", {"problem": "new", "answer": "1", "skill": "c"})).load()
    assert own.class_names == ["a", "b", "c"] and own.test.targets.tolist() == [2]


def _written_pictures(folder, how):
    """Sixty rows, five of each of twelve pictures, which lie in files or in the rows; and twenty without one."""
    pictures = [picture(n) for n in range(12)]
    for n, data in enumerate(pictures):
        (folder / f"{n}.png").write_bytes(data)
    written = {
        "path": lambda n: f"{n}.png",
        "other path": lambda n: f"./{n}.png",
        "uri": lambda n: "data:image/png;base64," + base64.b64encode(pictures[n]).decode(),
    }
    rows = [{"problem": f"q{k}", "answer": "1", "skill": "ab"[k % 2], "image": written[how[k % len(how)]](k // 5)} for k in range(60)]
    return lines(folder / "a.jsonl", *rows, *({"problem": f"t{k}", "answer": "1", "skill": "ab"[k % 2]} for k in range(20)))


@pytest.mark.parametrize("how", [["path"], ["path", "other path"], ["uri"]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_picture_is_in_both_parts(tmp_path, how, seed):
    path = _written_pictures(tmp_path, how)
    data = Problems(path=path, test_fraction=0.25, split_seed=seed).load()
    train, test = whole(data.train), whole(data.test)
    shown = [set(batch.inputs["image"][batch.present["image"], 0, 0, 0].tolist()) for batch in (train, test)]
    assert not shown[0] & shown[1] and len(shown[0] | shown[1]) == 12 and shown[1]
    assert abs(len(data.test) - 20) <= 4 and min(torch.bincount(data.test.targets)) > 0, "a picture has five rows"
    again = Problems(path=path, test_fraction=0.25, split_seed=seed).load()
    assert whole(again.test).inputs["text"] == test.inputs["text"]


def test_a_skill_with_one_picture_stays_in_training_and_one_with_two_large_ones_gives_one_away(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    asked = [("one", "0.png")] * 4 + [("two", "1.png")] * 6 + [("two", "2.png")] * 5 + [("three", "3.png")]
    rows = [{"problem": f"q{k}", "answer": "1", "skill": skill, "image": image} for k, (skill, image) in enumerate(asked)]
    data = Problems(path=lines(tmp_path / "a.jsonl", *rows), test_fraction=0.1).load()
    assert [data.class_names[t] for t in data.test.targets.tolist()] == ["two"] * 5
    with pytest.raises(DataError, match="all rows show the same picture"):
        Problems(path=lines(tmp_path / "b.jsonl", *rows[:4]), test_fraction=0.5).load()


def test_the_sessions_of_reasoning_are_made_of_real_rows(tmp_path):
    rows = [{"problem": f"q{n}", "answer": "1", "skill": "ab"[n % 2], "difficulty": n} for n in range(20)]
    scenario = Reasoning(data=Problems(path=lines(tmp_path / "a.jsonl", *rows), test_fraction=0.2), by="skill", order="given")
    scenario.open(0)
    assert [set(column(task.train, "skill")) for task in scenario] == [{"a"}, {"b"}]


@pytest.mark.parametrize(
    ("row", "message", "problem"),
    [
        ({"problem": "", "answer": "1"}, "the question is empty", "row without a question"),
        ({"problem": 5, "answer": "1"}, "the question is no text", "row without a question"),
        ({"problem": "q", "answer": None}, "the answer is empty", "row without an answer"),
        ({"problem": "q", "answer": "<answer> </answer>"}, "the answer is empty", "row without an answer"),
        ({"problem": "q", "answer": ["a"]}, r"the answer is \['a'\]: text or a number", "row without an answer"),
        ({"problem": "<image>q", "answer": "1"}, "<image> stands in the question 1 times and there are 0", "question that lacks a picture"),
        ({"problem": "q", "answer": "1", "image": "https://x.y/z.png"}, "fetch it and write its path", "picture at a web address"),
        ({"problem": "q", "answer": "1", "image": 5}, "5 is no picture", "picture of an unknown form"),
        (
            {"problem": "q", "answer": "1", "image": "data:image/png;base64,%%"},
            "data URI of the picture is damaged",
            "picture that does not decode",
        ),
        ({"problem": "q", "answer": "1", "choices": "a, b"}, "the choices are 'a, b': a list", "choices that are no list"),
        ({"problem": "q", "answer": "1", "difficulty": "very"}, "the difficulty is 'very'", "difficulty that is no number"),
        ({"problem": "q", "answer": "1", "skill": ""}, r"the skill \(skill\) is empty", "row without a skill"),
        ({"problem": [], "answer": "1"}, "dialogue without turns", "dialogue without turns"),
        ({"problem": [{"role": "robot", "content": ""}], "answer": "1"}, "a turn is by 'robot'", "turn of an unknown speaker"),
        (
            {"problem": [{"role": "assistant", "content": "x"}], "answer": "1"},
            "the last turn is by the assistant",
            "dialogue that asks nothing",
        ),
    ],
)
def test_a_wrong_row_names_its_place_or_is_left_out_and_counted(tmp_path, row, message, problem):
    good = {"problem": "q", "answer": "1", "skill": "s"}
    path = lines(tmp_path / "a.jsonl", good, {"skill": "s", **row})
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{message}.*on_error: skip"):
        Problems(path=path).load()
    data = Problems(path=path, on_error="skip").load()
    assert len(data.train) == 1 and data.problems == {problem: 1}


def test_a_picture_that_does_not_decode_is_an_error_or_left_out(tmp_path):
    for name, content in {"a": picture(1), "b": b"nothing"}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    rows = [{"problem": name, "answer": "1", "image": f"{name}.png"} for name in "abc"]
    path = lines(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: this is no image that can be read"):
        Problems(path=path).load()
    data = Problems(path=path, on_error="skip").load()
    assert whole(data.train).inputs["text"] == ["a"] and data.problems == {"image that does not decode": 2}


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", '{"problem": "q", "answer": "1"}\n{"problem"', {}, r"a\.jsonl, line 2: this is no JSON"),
        ("a.jsonl", "[1]\n", {}, r"a\.jsonl, line 1: an object is needed, and this is a list"),
        ("a.jsonl", "", {}, r"a\.jsonl: there is not a single record"),
        ("a.json", '{"problem": "q"}', {}, r"a\.json: a list of objects is needed, and this file holds an object"),
        ("a.json", '[{"problem": "q", "answer": "1"}, null]', {}, r"a\.json, row 1: an object is needed, and this is null"),
        ("a.json", "[", {}, r"a\.json: this cannot be read as JSON"),
        ("a.jsonl", '{"q": "q", "answer": "1"}\n', {}, r"no column is named problem, .*: say which of q, answer is the `question`"),
        ("a.jsonl", '{"problem": "q", "answer": "1"}\n', {"skill": "skil"}, r"there is no 'skil' \(skill\): there are problem, answer"),
        ("a.parquet", "no", {}, r"a\.parquet: this is no Parquet file"),
        ("a.txt", "no", {}, r"a\.txt: \.txt is not read here; understood are \.jsonl"),
    ],
)
def test_files_that_cannot_be_read_are_one_sentence(tmp_path, name, content, options, message):
    (tmp_path / name).write_text(content)
    with pytest.raises((DataError, ConfigError), match=message):
        Problems(path=tmp_path / name, **options).load()


def test_settings_that_contradict_each_other_are_refused_at_once():
    with pytest.raises(ConfigError, match="test and test_fraction contradict"):
        Problems(path="a", test="b", test_fraction=0.1)
    with pytest.raises(ConfigError, match="difficulty and pass_rate contradict"):
        Problems(path="a", difficulty="b", pass_rate="c")
