"""A calculator that fills in what the model writes an equals sign after: arXiv 2110.14168, appendix C.

"37 * 84 =" -> " 3108"        "so x =" -> ""
"""

import ast
import operator
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

LONGEST = 200
"""Characters of an expression. What is longer is not computed."""
EXPRESSION = re.compile(rf"[\d.,()+\-*/x×÷$% ]{{1,{LONGEST}}}$")
START = re.compile(r"(?<![\d.])[\d(]|(?<![\d.)] )(?<![\d.)])-(?=[\d(])")
DECIMALS = 4
COMPUTE: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def reply(messages: list[dict[str, str]]) -> str:
    """What goes on after the last message, which ends with an equals sign."""
    text = messages[-1]["content"].rstrip()
    result = last_value(text.removesuffix("="))
    return "" if result is None else f"{' ' if text[-2:-1].isspace() else ''}{result}"


def last_value(text: str) -> str | None:
    """The value of the longest calculation that the text ends with: a list's number or a full stop may come before it.

    Example:
        >>> last_value("2. 3 + 4 "), last_value("is 7 "), last_value("y + 3 + 4")
        ('7', None, None)
    """
    found = EXPRESSION.search(text)
    for match in START.finditer(text, found.start() if found else len(text)):
        if (value := value_of(text[match.start() :])) is not None:
            return value if _begins(text[: match.start()]) else None
    return None


def _begins(before: str) -> bool:
    """Whether a calculation can begin after this, and is no part of one with letters or powers."""
    words = before.split()
    if before[-1:].isalnum() or before[-1:] in ("_", "^"):
        return False
    if re.search(r"\d[,:]$", before):  # 1,5 and 5:30
        return False
    is_bullet = before.rpartition("\n")[2].strip() == "-"
    return is_bullet or not words or not (words[-1] == "x" or words[-1][-1] in "+-*/^×÷")


def value_of(expression: str) -> str | None:
    """The value in decimals, rounded to four; None for what is no calculation.

    Example:
        >>> value_of("(1,000 - 1) / 8"), value_of("7"), value_of("1 / 0")
        ('124.875', None, None)
    """
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)|\$", "", expression).replace("x", "*").replace("×", "*").replace("÷", "/")
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain.replace("%", "/100")).strip()
    try:
        tree = ast.parse(plain, mode="eval").body
        if not isinstance(tree, ast.BinOp):
            return None
        value = _value(tree, plain)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    rounded = round(value, DECIMALS)
    if rounded.denominator == 1:
        return str(rounded.numerator)
    return f"{Decimal(rounded.numerator) / Decimal(rounded.denominator):f}"


def _value(node: ast.expr, source: str) -> Fraction:
    """Exact. Raises ValueError for what is neither a number nor an operation of two."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(ast.get_source_segment(source, node) or "")  # Not the float, which is rounded.
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, source)
    if isinstance(node, ast.BinOp) and type(node.op) in COMPUTE:
        return COMPUTE[type(node.op)](_value(node.left, source), _value(node.right, source))
    raise ValueError("not a calculation")
