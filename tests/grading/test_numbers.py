import pytest

from posttrain.grading.equality import same_answer
from posttrain.grading.numbers import normalise, parse_quantity


@pytest.mark.parametrize(
    ("reference", "spellings"),
    [
        ("3/4", ["0.75", ".75", r"\frac34", r"\dfrac{3}{4}", r"\tfrac{3}{4}", "3 / 4", r"$\frac{3}{4}$"]),
        ("6/8", ["3/4", "0.75", "6/8"]),
        ("1234567", ["1,234,567", "1{,}234{,}567", r"1\,234\,567", "1234567.0", "1.234567e6"]),
        ("5 cm", ["5cm", r"5\text{ cm}", r"5\,\mathrm{cm}", "5", "5.0 cm"]),
        (r"90^\circ", [r"90^{\circ}", "90°", "90"]),
        ("42%", [r"42\%", "42 %"]),
        ("-3/2", [r"-\frac{3}{2}", r"\frac{-3}{2}", "-1.5", r"-1\frac12", "−1.5", "-1 1/2"]),
        ("(1,2)", ["(1, 2)", r"\left(1,2\right)", "(1.0,2)"]),
        (r"\{1,2\}", [r"\{2, 1\}"]),
        (r"\$5", ["$5", r"\$5.00", "5"]),
        ("Paris", ["Paris", r"\text{Paris}", "**Paris**", "Paris."]),
    ],
)
def test_spellings_of_one_answer(reference, spellings):
    for spelling in spellings:
        assert same_answer(spelling, reference), spelling


@pytest.mark.parametrize(
    ("reference", "others"),
    [
        ("3/4", ["6/8", "0.7500001", "75%", "4/3", "-3/4", "3/4/1"]),
        ("1234", ["1,23,4", "12,34", "1 2 3 4"]),
        ("(1,2)", ["(2,1)", "[1,2]", "1,2", "(1,2]"]),
        ("5 cm", ["5 km", "5 m", "5 %"]),
        ("42", ["42x", "42 42", "0x2a", "4²", "42-0", "42/1", r"\text{42 or 41}", "42%", "4.2e", "NaN"]),
        ("42%", ["42", "0.42"]),
        ("5x", ["5"]),
        ("Paris", ["paris", "Paris, London", "not Paris"]),
        ("", ["", " "]),
    ],
)
def test_what_is_not_the_answer(reference, others):
    for other in others:
        assert not same_answer(other, reference), other


def test_a_repeating_decimal_is_its_fraction():
    for written, value in (
        (r"0.\overline{3}", "1/3"),
        (r"-1.2\overline{45}", "-137/110"),
        (r".\overline{142857}", "1/7"),
    ):
        assert str(parse_quantity(written).value) == value
        assert same_answer(written, value)
        assert same_answer(value, written)
    assert not same_answer(r"0.\overline{3}", "0.333333333333")
    assert not same_answer(r"2\overline{3}", "7/3")


def test_a_number_is_parsed_exactly():
    assert str(parse_quantity("0.1").value) == "1/10"
    assert parse_quantity("1/0") is None
    assert parse_quantity("1" * 1999) is not None
    assert normalise("1" * 3000) == ""
