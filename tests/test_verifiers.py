"""The verifiers: what each takes for right, what a gold answer that cannot be read gives, and that no answer can be hedged."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcl.errors import DataError
from streamcl.metrics import Answer, Room
from streamcl.metrics.texts import Verified
from streamcl.plugins import plugins
from streamcl.stream import Batch
from streamcl.verifier import AnswerVerifier, Verifier, extract, marked
from streamcl.verifiers.choice import Choice
from streamcl.verifiers.exact import Exact
from streamcl.verifiers.number import Number
from streamcl.verifiers.own import Own
from streamcl.verifiers.sequence import SequenceVerifier
from streamcl.verifiers.tagged import Tagged
from streamcl.verifiers.text import Text

ANIMALS = "red\na cat\nblack cat\ndog"
EVERY = [kind for plugin in plugins("verifier").values() if issubclass(kind := plugin.load(), AnswerVerifier | Tagged)]
words = st.text(st.sampled_from("abAB 12.,-()<>{}\\/=%\n"), max_size=20)


def judged(verifier, answer, gold, choices=""):
    """One answer by one verifier: 1, 0, or None where there is nothing to judge by."""
    value = verifier([answer], {"answer": [gold], "choices": [choices]}).item()
    return None if math.isnan(value) else value


# What is looked at ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<answer>5</answer>", "5"),
        ("<ANSWER> a\nb </Answer> and more", "a\nb"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>1<answer>2</answer></answer>", "2"),
        ("so <answer>7", "7"),
        ("<answer>1</answer> or <answer>", "1"),
        (r"\boxed{3}", "3"),
        (r"\boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{a} \boxed{\boxed{b}}", "b"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{9} <answer>4</answer>", "4"),
        (r"<answer>\boxed{4} cm</answer>", "4"),
        (r"<think>\boxed{3}</think> 4", None),
        ("<think><answer>3</answer></think> <answer>4</answer>", "4"),
        ("<think><answer>3</answer></think>", "3"),
        ("five", None),
        ("<answer></answer>", ""),
        ("<answer>1</answer> or <answer>2</answer>", ""),
        ("<answer>2</answer>, <answer>2</answer>", "2"),
        (r"\boxed{1} or \boxed{2}", ""),
        (r"$\boxed{1}$, $\boxed{2}$", ""),
        (r"<answer>not \boxed{2}</answer>", ""),
        (r"It isn't $\boxed{2}$", ""),
        ("It is not <answer>2</answer>", ""),
        (r"It is not \boxed{1} but \boxed{2}", "2"),
    ],
)
def test_the_answer_is_what_was_marked_last(text, inside):
    assert marked(text) == inside
    if inside is not None:
        assert extract(text) == inside


def test_without_a_mark_the_answer_is_what_follows_the_thinking():
    assert extract(" <think> 7 apples </think> 3 ") == "3"
    assert extract("<think> only this") == "<think> only this"


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab{}\\ <>"), max_size=12), words)
def test_whatever_stands_around_it_balanced_braces_in_a_box_are_what_it_holds(around, inside):
    if "{" not in inside and "}" not in inside and "\\" not in inside and "answer" not in around:
        assert marked(rf"{around.replace('{', '').replace(chr(92), '')} \boxed{{{{{inside}}}}}") == f"{{{inside}}}".strip()


def test_a_response_of_nothing_but_opened_boxes_is_read_in_one_pass():
    text = r"\boxed{" * 20_000
    assert marked(text) is None and marked(text + "}" * 20_000) == ""


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("start", ["5 x 10 ^", "the answer", "a", "3, then"])
def test_long_gaps_in_a_response_are_read_like_short_ones(kind, start):
    for gap in (" ", "\t\n"):
        long, short = (judged(kind(), f"{start}{gap * times}2", "2", "1\n2") for times in (20_000, 1))
        assert long == short


# What all of them promise ---------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(EVERY), words, words, st.sampled_from(["", ANIMALS, "1\n2", "a b\nb"]))
def test_judgements_are_from_0_to_1_and_a_right_answer_that_is_readable_agrees_with_itself(kind, answer, gold, choices):
    verifier = kind()
    assert isinstance(verifier, Verifier)
    both = verifier([answer, f"<answer>{gold}</answer>"], {"answer": [gold, gold], "choices": [choices, choices]})
    assert both.dtype == torch.float32 and both.shape == (2,)
    assert bool(both[0].isnan()) == bool(both[1].isnan()), "whether there is something to judge by is the gold answer's alone"
    if "answer" not in gold and "boxed" not in gold and not bool(both[1].isnan()):
        assert both[1] == 1 and 0 <= both[0] <= 1


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_and_a_missing_column_are_told_apart_from_a_wrong_answer(kind):
    assert judged(kind(), "3", "") is None
    assert kind()([], {"answer": [], "choices": []}).shape == (0,)
    with pytest.raises(DataError, match=r"column 'answer' is missing: a verifier needs one text for each of the 1 answers"):
        kind()(["a"], {"choices": [""]})
    with pytest.raises(DataError, match="column 'answer' has 2 values"):
        kind()(["a"], {"answer": ["a", "b"]})


def test_a_gold_answer_in_tags_is_read_as_one_without():
    assert judged(Number(), "4", "<think>2+2</think><answer>4</answer>") == 1
    assert judged(Choice(), "B", r"so \boxed{\text{B}}") == 1


def test_the_metric_leaves_out_what_cannot_be_judged():
    count = Verified(Room(1))
    extra = {"answer": ["4", "many", "B", "B"], "verifier": ["number", "number", "choice", "choice"], "choices": ["", "", "", ""]}
    batch = Batch({}, torch.zeros(4, dtype=torch.int64), torch.arange(4), extra=extra)
    count.update(Answer(batch, texts=["four", "3", "(B)", "C"]))
    assert count.compute().value == pytest.approx(2 / 3)


# One by one -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "gold", "right"), [(" a ", "a", 1), ("A", "a", 0), ("<answer>a</answer>", "a", 1), ("a.", "a", 0)])
def test_exact(answer, gold, right):
    assert judged(Exact(), answer, gold) == right


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("The Cat!", "a cat", 1),
        ("two dogs", "2 dogs", 1),
        ("twenty", "20", 0),
        ("1,000", "1000", 1),
        ("3.5", "35", 0),
        ("-5", "5", 0),
        ("\u22125", "-5", 1),
        ("10:30", "1030", 0),
        ("U.S.", "us", 1),
        ("don't", "dont", 1),
        ("T-shirt", "t shirt", 1),
        ("C++", "C", 0),
        ("The The", "the the", 1),
        ("the", "a", 0),
        ("?", "!", 0),
        ("café", "cafe", 0),
        ("CAFE\u0301", "café", 1),
        ("a cat and a dog", "cat", 0),
        ("", "a", 0),
    ],
)
def test_text(answer, gold, right):
    assert judged(Text(), answer, gold) == right


READ_AS = {
    "3": ["3", "3.", "+3", "three", "THREE apples", "x = 3", "2 + 1 = 3", "3 cm", "3 cm^2", "3 m²", "3 km/h", "$3", "3.0", "(3)"],
    "-3": ["-3", "\u22123", "- 3", "minus three", "-3 °C", "-3^\\circ"],
    "1234.5": ["1,234.5", "1.234,5", "1234.50", "$1,234.50$", r"1{,}234.5", "1\u202f234.5", "12345e-1"],
    "1234567": ["1,234,567", "1.234.567"],
    "5/2": ["2.5", "2,5", "5/2", "2 1/2", "2½", r"\frac{5}{2}", r"\dfrac52", r"\text{2.5 kg}"],
    "-3/2": ["-1 1/2", r"-\frac{3}{2}", "-1.5", r"\frac{-3}{2}"],
    "200000": ["2e5", r"2 \times 10^5", "2 × 10^{5}", "0.2 million", "two hundred thousand"],
    "21": ["twenty-one", "twenty one", "21 years"],
}
UNREADABLE = ["many", "", "3 or 4", "x = 3 or x = 4", "3-4", "3 to 4", "3, 4", "2^10", "3²", r"\sqrt{2}", "2 pi", r"2\pi", "± 3", "1/0"]
UNREADABLE += ["1/2/2020", "10:30", "nan", "inf", "1e999999999", "9" * 5000, "1_000", "0x10", "two-thirds", "v2", "1,23,456", "1.2.3"]


@pytest.mark.parametrize(("number", "text"), [(number, text) for number, texts in READ_AS.items() for text in texts])
def test_a_number_is_the_same_however_it_is_written(number, text):
    exactly = Number(relative=0)
    assert exactly.read(text, [], True).value == Fraction(number)
    assert judged(exactly, f"<answer>{text}</answer>", str(float(Fraction(number)))) == 1


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_is_no_single_number_is_no_gold_answer_and_earns_nothing_as_an_answer(text):
    assert judged(Number(), "3", text) is None
    assert judged(Number(), f"<answer>{text}</answer>", "3") == 0


@pytest.mark.parametrize(
    ("answer", "number"),
    [("There are 3 + 4 = 7 apples", 7), ("The answer is 7 out of 10.", 7), ("First 1, then 2.", 2), ("Answer: -3", -3), ("no idea", None)],
)
def test_in_a_free_sentence_the_number_after_the_answer_or_the_last_counts(answer, number):
    read = Number().read(answer, [], False)
    assert number is None if read is None else read.value == number


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [("50%", "50%", 1), ("50", "50%", 1), ("0.5", "50%", 1), ("50%", "0.5", 1), ("50%", "50", 1), ("50%", "0.5%", 0), ("0.5", "50", 0)],
)
def test_percent_agrees_with_its_share(answer, gold, right):
    assert judged(Number(), answer, gold) == right


def test_a_difference_of_just_the_tolerance_is_in_and_one_beyond_it_is_out():
    assert judged(Number(absolute=0.1), "0.4", "0.3") == 1, "as floats 0.4 - 0.3 is more than 0.1"
    assert judged(Number(absolute=0.1), "0.4001", "0.3") == 0
    assert judged(Number(relative=0.05), "105", "100") == 1 and judged(Number(relative=0.05), "-95", "-100") == 1
    assert judged(Number(relative=0.05), "105.1", "100") == 0 and judged(Number(relative=0.05), "0.001", "0") == 0
    assert judged(Number(), "0.3333", "1/3") == 0 and judged(Number(), str(1 / 3), "1/3") == 1


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(0, 10**6), st.sampled_from(["", " cm", " dollars.", "%"]))
def test_every_number_is_read_back_from_its_usual_forms(whole, micro, unit):
    value = Fraction(whole) + (Fraction(micro, 10**6) if whole >= 0 else -Fraction(micro, 10**6))
    sign, size = "-" if value < 0 else "", abs(value)
    digits = f"{int(size):,}.{int((size - int(size)) * 10**6):06d}"
    for text in (f"{sign}{digits}{unit}", f"{sign}{digits.replace(',', '')}{unit}", f"{value.numerator}/{value.denominator}{unit}"):
        assert Number().read(text, [], True).value == value


LETTERS = {
    0: ["A", "red", "Red.", "A. red", "The answer is A"],
    1: [
        *("B", "b", "B.", "(B)", "(b)", "b)", "B) a cat", "(B) the cat", "B: cat", "cat", "The cat", "It is a cat", "**B**", r"\text{B}"),
        "The answer is B",
        "the answer is (b).",
        "The correct answer: **B**.",
        "Option B is right",
        "Either (A) or (B), so the answer is B",
    ],
    2: ["C", "black cat", "It is a black cat", "C - black cat"],
    3: ["D", "dog", "A dog", "The answer is a dog", "I think it is D because of the ears", "Choose D"],
    None: ["E", "x", "", "A or B", "B, C", "the answer is B or C", "B. dog", "red or dog", "Not a dog but a cat", "The answer is E"],
}


@pytest.mark.parametrize(("place", "text"), [(place, text) for place, texts in LETTERS.items() for text in texts])
def test_a_choice_is_its_letter_or_its_words_and_two_choices_are_none(place, text):
    assert Choice().read(text, ANIMALS.split("\n"), False) == place
    assert judged(Choice(), text, "dog", ANIMALS) == float(place == 3)


HEDGED = [
    *("The answer is (B) or (C).", "Answer: B, C", "The answer is not (B).", "It isn't B", "B. It could also be C", "The answer is B/C"),
    *("Answer: B and C", "The answer is B, or a dog", "The answer is B. Or C.", "Answer: B\nC", "Answer: B\ndog", "The answer is B) dog"),
    *("The answer is either (b) or (c)", "The answer is B or c", "The answer is B. No, wait, C", "The answer is B, not!", "Not B"),
    *("I don't think the answer is B", "The answer can't be B", "Everything except B", "Option B is wrong", "Never pick B", "All but B"),
    *("Neither B", "It isn’t a cat", "There is no cat", "It is not a cat", "B. dog or cat", "cat or maybe not", "B is incorrect."),
    *("<answer>not cat</answer>", "<answer>B or maybe not</answer>", "<answer>The answer is B</answer>", "<answer>B, C</answer>"),
    *("<answer>cat dog</answer>", "<answer>B. cat or dog</answer>", r"\boxed{B/C}", r"\boxed{A} or \boxed{B}", "<answer>It is B</answer>"),
    *(r"<answer>not \boxed{B}</answer>", "<answer>C</answer>, <answer>B</answer>", "The answer is B but it could be D"),
]
COMMITTED = [
    *("The answer is B because A and C are not shown.", "Option A is wrong. So the answer is B.", "The answer is B. Option C is wrong."),
    *(
        "It is not a dog, so the answer is B",
        "Answer: B\nA dog is not what I see.",
        "The answer is B. cat",
        "The answer is B) a cat, clearly.",
    ),
    *("I choose B since it isn't a dog", "It is not red, so B", "The answer is definitely (B)!", "<answer>(B)</answer>", r"\boxed{B. cat}"),
    *("<answer>The cat.</answer>", "<answer>B) the cat</answer>", "B. This is a cat because it does not bark."),
]


@pytest.mark.parametrize(("text", "right"), [(text, 0) for text in HEDGED] + [(text, 1) for text in COMMITTED])
def test_a_choice_that_is_hedged_or_denied_earns_nothing_and_one_that_is_argued_for_does(text, right):
    assert judged(Choice(), text, "B", "red\ncat\ndog\nbird") == right


@pytest.mark.parametrize("text", ["B. or C", "B or C", "<answer>B. or C</answer>", "<answer>B. not</answer>", "not B"])
def test_without_choices_letters_are_not_hedged_either(text):
    assert judged(Choice(), text, "B") == 0


def test_choices_whose_own_words_deny_or_hold_letters_can_be_chosen():
    offered = "yes\nno\nvitamin C\nnone of the above"
    for right, texts in {
        "B": ["No", "The answer is no", "No, there isn't any", "The answer is B. No", "<answer>B. No</answer>"],
        "C": ["The answer is C, vitamin C", "Vitamin C"],
        "D": ["The answer is D, none of the above.", "none of the above", "It is none of the above"],
    }.items():
        assert [judged(Choice(), text, right, offered) for text in texts] == [1] * len(texts)
    assert judged(Choice(), "The answer is A", "A", "C\nA\nB") == 1, "the words of a choice go before its letter in a sentence too"


@pytest.mark.parametrize(
    "text",
    [
        *("<answer>not 3</answer>", "<answer>3 or not</answer>", "<answer>at least 3</answer>", "<answer>more than 3</answer>"),
        *("<answer>x < 3</answer>", "<answer>x >= 3</answer>", "<answer>x != 3</answer>", "<answer>≤ 3</answer>", "<answer>3, 4</answer>"),
        *("<answer>x = 4, x = 3</answer>", "<answer>minus 3</answer>", "<answer>negative 3</answer>", "<answer>-(3)</answer>"),
        *(
            "<answer>3 squared</answer>",
            "<answer>half of 3</answer>",
            "<answer>anything but 3, never 3</answer>",
            r"\boxed{4} or \boxed{3}",
        ),
        *("The answer is 3 or 4.", "The answer is not 3", "The answer isn't 3", "The answer is 3, 4", "It is 4 or 3", "It is not 3"),
        *(
            "The answer is 3 cm or 4 cm",
            "The answer is 3 or not",
            "I don't think the answer is 3",
            "1, 2, 3",
            "between 2 and 3",
            "3 is wrong",
        ),
    ],
)
def test_a_number_that_is_hedged_or_denied_earns_nothing(text):
    assert judged(Number(), text, "3") == 0


@pytest.mark.parametrize("text", ["It is not 4, so the answer is 3.", "It is not 4 but 3", "There are 2 cats and 3 dogs", "2 + 1 = 3"])
def test_a_number_that_is_argued_for_earns_its_point(text):
    assert judged(Number(), text, "3") == 1


def test_minus_in_words_is_a_minus():
    assert [judged(Number(), f"<answer>{text}</answer>", "-3") for text in ("minus 3", "negative 3", "minus three")] == [1, 1, 1]


@pytest.mark.parametrize(
    "text", ["It isn't this: 3, 1, 2", "The order is not: 3, 1, 2", "Not 3, 1, 2", "Wrong: 3, 1, 2", "3, 1, 2 or 1, 2, 3"]
)
def test_an_order_that_is_denied_earns_nothing(text):
    assert judged(SequenceVerifier(), text, "3, 1, 2") == 0


@pytest.mark.parametrize("text", ["not cat", "cat or dog", "cat, dog", "isn't cat", "<answer>cat</answer> or <answer>dog</answer>"])
@pytest.mark.parametrize("kind", [Exact, Text, Tagged])
def test_words_are_whole_or_wrong(kind, text):
    assert judged(kind(), text, "cat") == 0 and judged(kind(), "<answer>not cat</answer>", "cat") == 0
    assert judged(kind(), r"<answer>not \boxed{cat}</answer>", "cat") == 0 and judged(kind(), r"\boxed{dog}, \boxed{cat}", "cat") == 0


def test_choices_that_bring_their_letters_have_none_that_have_them_as_words_and_rows_without_choices():
    assert judged(Choice(), "blue", "B", "A) red\nB) blue") == 1 and judged(Choice(), "B", "B) blue", "A) red\nB) blue") == 1
    assert Choice().read("A", ["C", "A", "B"], True) == 1, "the words of a choice go before its letter"
    assert judged(Choice(), "B. cat", "B") == 1 and judged(Choice(), "cat", "B") == 0 and judged(Choice(), "B", "cat") is None
    assert judged(Choice(), "B", "E", ANIMALS) is None, "a right answer beyond the choices is none"
    assert judged(Choice(), "same", "A", "same\nsame") == 0 and judged(Choice(), "A", "same", "same\nsame") is None
    assert judged(Choice(), "3.5", "B", "35\n3.5") == 1


@pytest.mark.parametrize(
    "text",
    [
        *("3,1,2", "[3, 1, 2]", "3 -> 1 -> 2", "3→1→2", "3 1 2", "3; 1; 2", "3, 1 and 2", "312", "The order is 3, 1, 2."),
        "1. 3\n2. 1\n3. 2",
        "- three\n- one\n- two",
        "3.0, 1.0, 2.0",
        "<answer>3 > 1 > 2</answer>",
        r"\boxed{3, 1, 2}",
        "three, then one, then two",
    ],
)
def test_a_sequence_is_the_same_however_it_is_parted(text):
    assert judged(SequenceVerifier(), text, "3, 1, 2") == 1


@pytest.mark.parametrize("text", ["3, 2, 1", "3, 1", "3, 1, 2, 2", "", "1, 2", "3.1.2", "the order is 1, 2, 3"])
def test_another_order_or_length_is_wrong(text):
    assert judged(SequenceVerifier(), text, "3, 1, 2") == 0


def test_a_sequence_of_words_is_compared_as_text():
    assert judged(SequenceVerifier(), "The cat then a dog", "Cat, Dog") == 1 and judged(SequenceVerifier(), "dog, cat", "Cat, Dog") == 0
    assert judged(SequenceVerifier(), "BAC", "B, A, C") == 1 and judged(SequenceVerifier(), "B, A, C", "BAC") == 0
    assert judged(SequenceVerifier(), "1,000", "1000") == 0, "a comma always parts"


def test_tagged_takes_only_what_stands_where_it_was_asked_for():
    verifier = Tagged(verifier=Number())
    assert judged(verifier, "4", "4") == 0 and judged(verifier, "<answer>four</answer>", "4") == 1
    assert judged(verifier, "4", "many") is None and judged(verifier, "<answer></answer>", "4") == 0
    assert judged(Tagged(), r"It is \boxed{The cat}", "cat") == 1 and judged(Tagged(), "cat", "cat") == 0


def test_a_verifier_of_ones_own_needs_to_say_only_how_to_read():
    class Parity(AnswerVerifier):
        def read(self, text, choices, alone):
            return int(text) % 2 if text.isdigit() else None

    assert Parity()(["3", "<answer>4</answer>", "x", "1"], {"answer": ["5", "5", "5", "?"]}).nan_to_num(-1).tolist() == [1, 0, 0, -1]


def test_the_own_verifier_judges_each_row_by_the_one_that_it_names() -> None:
    rows = {"answer": ["3", "B", ""], "choices": ["", "cat\ndog", ""], "verifier": ["number", "choice", "exact"]}
    judged = Own(weight=0.5)
    assert judged.weight == 0.5
    given = judged(["three", "the dog", "x"], rows)
    assert given[:2].tolist() == [1, 1]
    assert given[2].isnan()  # nothing to judge by is not a wrong answer


def test_of_several_answers_one_that_is_right_is_enough() -> None:
    extra = {"answer": ["3", "4", ""], "verifier": ["number"] * 3}
    batch = Batch({"text": ["a", "b", "c"]}, torch.tensor([0, 1, 1]), torch.arange(3), extra=extra)
    metric = Verified(Room(2))
    metric.update(Answer(batch, texts=[["1", "3"], ["1", "2"], ["1", "2"]]))
    assert metric.compute().value == 0.5  # the third row has no right answer to judge by
    assert metric.compute().per_class == [1.0, 0.0]
