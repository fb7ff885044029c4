"""The calculator: what it computes, and what it leaves alone."""

import time

import pytest

from dppo_cli.environment.calculator import reply


def told(text: str) -> str:
    return reply([{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": text}])


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("37*84=", "3108"),
        ("So 37 * 84 =", " 3108"),
        ("7 - 10 =", " -3"),
        ("-3 + 4 =", " 1"),
        ("2 - -3 =", " 5"),
        ("12 - (-5) =", " 17"),
        ("(3 + 4) * 2 =", " 14"),
        ("3 x 4 × 5 ÷ 2 =", " 30"),
        ("1 / 3 =", " 0.3333"),
        ("2 / 3 =", " 0.6667"),
        ("0.1 + 0.2 =", " 0.3"),
        ("$1,200 + $35.50 =", " 1235.5"),
        ("50% * 20 =", " 10"),
        ("She has 3 apples. 3 + 4 =", " 7"),
        ("5. 3 + 4 =", " 7"),
        ("first\n- 3 + 4 =", " 7"),
        ("3 + 4 = 7 - 2 =", " 5"),
        ("3 + 4, 5 + 6 =", " 11"),
        ("total: 4*5=", "20"),
        ("(3 + 4 =", " 7"),
        ("10 / 4 = ", " 2.5"),
        ("05 * 3 =", " 15"),
        ("-1 / 30000 =", " 0"),
        ("99999999999999999999.5 + 0 =", " 99999999999999999999.5"),
    ],
)
def test_what_is_computed(text: str, result: str) -> None:
    assert told(text) == result


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "=",
            "x =",
            "the answer is 5 =",
            "1 / 0 =",
            "2 ** 3 =",
            "1 ** 3 + 4 =",
            "x^2 + 1 =",
            "y - 3 + 4 =",
            "1,5 + 2 =",
        ),
        *(
            "a x 3 + 4 =",
            "a-3 + 4 =",
            "n3 + 4 =",
            "1_0 + 2 =",
            "((((=",
            "3 +=",
            "1e400 * 2 =",
            "f(3 + 4) * =",
            "5:30 + 2 =",
        ),
        "9" * 300 + " * 2 =",
    ],
)
def test_what_is_no_calculation(text: str) -> None:
    assert told(text) == ""


@pytest.mark.parametrize(
    "text", ["1+" * 50_000 + "1=", "(" * 100_000 + "1+1=", "9" * 100_000 + "*9=", "1,1 " * 50_000 + "="]
)
def test_a_long_text_takes_no_time(text: str) -> None:
    start = time.perf_counter()
    told(text)
    assert time.perf_counter() - start < 5
