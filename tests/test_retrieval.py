"""Domains of captioned pictures one after another: which rows belong together, and what recall makes of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.scenarios.retrieval import Retrieval
from streamcl.scenarios.sources.digit_scenes import DigitScenes
from streamcl.scenarios.sources.digits import Digits

from streamcl.data import ArrayDataset, FileDataset, whole
from streamcl.errors import ConfigError, DataError
from streamcl.metrics import METRICS, Answer, Room
from streamcl.stream import Grouping, Modality, Source, SourceData, take


class Captioned(Source):
    """Pictures of one pixel, numbered, with `several` captions each; domains are dealt out by picture."""

    licence = "CC0"

    def __init__(self, pictures=6, several=2, domains=2, lazy=False, pairs=True, absent=False):
        self.pictures, self.several, self.domains, self.lazy, self.pairs, self.absent = pictures, several, domains, lazy, pairs, absent

    def load(self):
        pair = torch.arange(self.pictures).repeat_interleave(self.several)
        domain = pair % self.domains
        inputs = {"image": pair.to(torch.uint8)[:, None, None, None], "text": [f"picture {n}" for n in pair.tolist()]}
        extra = {"pair": pair} if self.pairs else {}
        present = {"image": pair != 0} if self.absent else None

        def part(first):
            ids = first + torch.arange(len(pair))
            if self.lazy:
                return FileDataset(lambda rows: {n: take(c, torch.tensor(rows)) for n, c in inputs.items()}, domain, ids, 0, extra, present)
            return ArrayDataset(inputs, domain, ids, present, extra)

        names = [f"d{number}" for number in range(self.domains)]
        modalities = {"image": Modality("image", (1, 1, 1), 255), "text": Modality("text")}
        groupings = {"domain": Grouping(names, domain, domain), "half": Grouping(["x"], torch.zeros_like(domain))}
        return SourceData(part(0), part(len(pair)), names, modalities, "text", "CC0", groupings=groupings)


def opened(seed=0, **options):
    scenario = Retrieval(**options)
    scenario.open(seed)
    return scenario


def recalls(scenario, batch, embeddings):
    def score(name):
        metric = METRICS[name].load()(Room(1))
        metric.update(Answer(batch, embeddings=embeddings))
        return metric.compute().value

    return [score(name) for name in scenario.info.metrics]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 3), st.integers(1, 2), st.booleans(), st.sampled_from([0.0, 0.4]), st.integers(0, 99))
def test_every_row_is_in_the_task_of_its_domain_and_captions_of_one_picture_stay_together(
    pictures, several, domains, lazy, validation, seed
):
    scenario = opened(seed, data=Captioned(pictures, several, domains, lazy), by="domain", order="seed", validation=validation)
    seen = []
    for index, task in enumerate(scenario):
        train = whole(task.train)
        parts = [train] + ([whole(task.validation)] if validation and len(task.validation) else [])
        for batch in parts:
            assert {f"d{n % domains}" for n in batch.extra["pair"].tolist()} == {task.domain} and set(batch.target.tolist()) == {index}
            assert batch.inputs["text"] == [f"picture {n}" for n in batch.extra["pair"].tolist()]
            assert batch.inputs["image"].flatten().tolist() == batch.extra["pair"].tolist()
        if len(parts) == 2:
            assert not set(train.extra["pair"].tolist()) & set(parts[1].extra["pair"].tolist())
        seen += [number for batch in parts for number in batch.ids.tolist()]
        assert len(scenario.test(task, task)) == several * len([n for n in range(pictures) if f"d{n % domains}" == task.domain])
    assert sorted(seen) == list(range(pictures * several))


def test_recall_of_embeddings_worked_out_by_hand():
    scenario = opened(data=Captioned(4, 2, 1), by="domain")
    task = next(iter(scenario))
    batch = whole(scenario.test(task, task))
    pair = batch.extra["pair"]
    right = torch.eye(4)[pair]
    assert recalls(scenario, batch, {"image": right, "text": right}) == [1, 1, 1]
    # The captions of picture 2 lie near picture 3 and those of 3 near 0: half of the texts find their picture first. Pictures 0, 1 and 2
    # find a caption of their own first, 3 finds one of 2; among five of the eight texts and of the four pictures everything is found.
    shifted = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.1, 0.9], [0.9, 0, 0, 0.1]])[pair]
    assert recalls(scenario, batch, {"image": right, "text": shifted}) == [pytest.approx((4 / 8 + 3 / 4) / 2), 1, 1]


@pytest.mark.parametrize("lazy", [False, True])
def test_sources_of_a_list_share_no_id_and_no_pair(lazy):
    scenario = opened(data=[Captioned(4, 2, lazy=lazy), Captioned(3, 1, lazy=lazy, pairs=False)], names=["a", "b"], validation=0.34)
    ids, pairs = [], []
    for task in scenario:
        parts = [whole(part) for part in (task.train, task.validation, scenario.test(task, task))]
        ids += [number for batch in parts for number in batch.ids.tolist()]
        pairs.append({number for batch in parts for number in batch.extra["pair"].tolist()})
        assert sorted(text for batch in parts[:2] for text in batch.inputs["text"]) == sorted(parts[2].inputs["text"])
        assert torch.equal(task.train[torch.arange(2)].ids, task.train.ids[:2])
    assert len(ids) == len(set(ids)) == 2 * (8 + 3) and not pairs[0] & pairs[1] and len(pairs[0]) == 4
    assert scenario.info.class_names == ("a", "b") and scenario.info.licence == "CC0"


def test_captions_of_digit_scenes_come_by_their_look():
    source = DigitScenes(as_="captions", scenes=80, test_scenes=40)
    scenario = opened(data=source, by="domain")
    assert scenario.info.metrics == ("recall_1", "recall_5", "recall_10") and scenario.info.target == "text"
    assert [(task.domain, len(task.train), len(scenario.test(task, task))) for task in scenario] == [
        (name, 20, 10) for name in ("plain", "inverted", "coloured", "noisy")
    ]
    one, other = (opened(seed=3, data=source, by="domain", order="seed") for _ in range(2))
    for first, second in zip(one, other, strict=True):
        assert first.name == second.name and torch.equal(whole(first.train).inputs["image"], whole(second.train).inputs["image"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": Digits()}, ConfigError, "text and one other modality are needed, and this source has image"),
        ({"data": Captioned(), "by": "looks"}, ConfigError, "unknown grouping 'looks': there are domain, half"),
        ({"data": Captioned(), "by": "half"}, ConfigError, "the grouping 'half' says nothing of the test samples"),
        ({"data": Captioned(), "order": ["zzz"]}, ConfigError, "order names an unknown domain 'zzz'"),
        ({"data": Captioned(absent=True)}, DataError, "2 training rows have no image"),
        ({"data": Captioned(1, 1, 2)}, DataError, "no training sample of d1"),
        ({"data": DigitScenes(as_="labels", scenes=8, test_scenes=8)}, ConfigError, "text and one other modality"),
    ],
)
def test_what_cannot_be_searched_both_ways_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        opened(**options)
