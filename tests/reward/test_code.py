"""Programs against the tests of their row."""

import json
import subprocess
import sys
import textwrap

import make
import pytest
from locked_up import WHY_NOT, needs_namespaces

from dppo_cli.errors import ConfigError, RewardError
from dppo_cli.reward.program import Code
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Score


def option(**changes) -> Code:
    """With the defaults of conf/reward/code.yaml, but less time."""
    fields = {
        "tests_column": "tests",
        "pattern": r"(?s)```(?:python|py)?[ \t]*\n(.*?)```",
        "partial": False,
        "max_tests": 20,
        "timeout": 2.0,
        "memory_mib": 256,
        "processes": 16,
        "disk_mib": 16,
        "output_kib": 1024,
        "workers": 2,
    }
    return Code(**{**fields, **changes})


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return option().load(make.fail)


@pytest.fixture(scope="module")
def partial() -> Scorer:
    return option(partial=True).load(make.fail)


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


def scored(scorer: Scorer, tests: object, *programs: str, **columns: str) -> list[Score]:
    prompt = make.prompt(answer="", tests=tests, **columns)
    return scorer([prompt], [[make.completion(text=fenced(program)) for program in programs]])[0]


ADD, SUBTRACT = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"
SUM = "a, b = map(int, input().split())\nprint(a + b)"


@needs_namespaces
@pytest.mark.parametrize(
    ("tests", "right", "wrong"),
    [
        (["assert add(1, 2) == 3", "assert add(0, 0) == 0"], ADD, SUBTRACT),
        ("assert add(1, 2) == 3", ADD, SUBTRACT),
        ('["assert add(1, 2) == 3"]', ADD, SUBTRACT),
        ([{"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "4"}], SUM, "print(3)"),
        ({"inputs": ["1 2\n", "2 2"], "outputs": ["3\n", "4"]}, SUM, "print(3)"),
        (json.dumps({"inputs": [["1 2"]], "outputs": [["3"]]}), SUM, "print(4)"),
    ],
    ids=["assertions", "code", "json_of_assertions", "pairs", "inputs_and_outputs", "json_of_lists"],
)
def test_the_forms_of_tests(scorer, tests, right, wrong):
    assert [score.value for score in scored(scorer, tests, right, wrong)] == [1.0, 0.0]


@needs_namespaces
def test_a_check_function_is_called_with_the_entry_point(scorer):
    tests = "def check(candidate):\n    assert candidate(1, 2) == 3"
    found = scored(scorer, tests, ADD, SUBTRACT, entry_point="add")
    assert found == [Score(1.0), Score(0.0, note="test 1: AssertionError:")]


@needs_namespaces
def test_white_space_of_the_output_does_not_count(scorer):
    programs = ["print('3')", "print(' 3 ')", "print('3\\n\\n')", "print('33')", "print('3', '3')"]
    found = scored(scorer, [{"input": "", "output": "3\n"}], *programs)
    assert [score.value for score in found] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert found[-1].note == "test 1: wrong output"


@needs_namespaces
def test_the_share_of_tests_that_pass(partial):
    tests = ["assert add(0, 0) == 0", "assert add(1, 0) == 1", "assert add(1, 2) == 3", "1 / 0"]
    (found,) = scored(partial, tests, SUBTRACT)
    assert found == Score(0.5, note="test 4: ZeroDivisionError: division by zero")
    pairs = [{"input": "1 2", "output": "3"}, {"input": "x", "output": "3"}, {"input": "2 2", "output": "5"}]
    (found,) = scored(partial, pairs, SUM)
    assert found.value == 1 / 3
    assert found.note.startswith("test 2: ValueError: invalid literal")
    assert found.note.endswith("; test 3: wrong output")


@needs_namespaces
def test_only_so_many_inputs_are_run():
    pairs = [{"input": "1 2", "output": "3"}] * 2 + [{"input": "", "output": "other"}] * 5
    assert scored(option(max_tests=2).load(make.fail), pairs, SUM) == [Score(1.0)]


@needs_namespaces
def test_which_part_of_the_response_is_the_program(scorer):
    texts = [
        "```\nprint(1)\n```\nno:\n```py\nprint(3)\n```",
        "print(3)",
        "```python\nprint(3)",
        "```rust\nprint(3)\n```",
    ]
    prompt = make.prompt(answer="", tests=[{"input": "", "output": "3"}])
    ((*found,),) = scorer([prompt], [[make.completion(text=text) for text in texts]])
    assert [score.value for score in found] == [1.0, 0.0, 0.0, 0.0]
    assert found[1].note == "no program was found"
    ((whole,),) = option(pattern=None).load(make.fail)([prompt], [[make.completion(text="print(3)")]])
    assert whole == Score(1.0)


@needs_namespaces
@pytest.mark.parametrize(
    ("tests", "note"),
    [
        (None, "the problem has no tests"),
        ([], "the problem has no tests"),
        ("", "the problem has no tests"),
        ([1], "the problem's tests have a form that is not known"),
        ([{"in": 1}], "the problem's tests have a form that is not known"),
        (
            {"fn_name": "f", "inputs": [[1]], "outputs": [1]},
            "the problem's tests call a function by name (fn_name), which is not supported",
        ),
    ],
)
def test_a_row_without_tests_that_can_be_run_is_not_judged(scorer, tests, note):
    assert scored(scorer, tests, ADD) == [Score(None, note=note)]


@needs_namespaces
def test_programs_that_end_badly_are_wrong_and_their_neighbours_are_scored(scorer):
    programs = {
        "while True: pass": "it took longer than 2 seconds",
        "import os; os._exit(0)": "none of its assertions passed",
        "import sys; sys.exit(0)": "none of its assertions passed",
        "x = bytearray(10**11)": "MemoryError",
        "import os\nos.kill(os.getppid(), 9); os.kill(os.getpid(), 9)": "none of its assertions passed",
        "while True: print('x' * 10**6, flush=True)": "it took longer than 2 seconds",
        "def add(a, b) return a": "SyntaxError: expected ':'",
        "import socket\nsocket.create_connection(('1.1.1.1', 80))": "OSError: [Errno 101] Network is unreachable",
    }
    found = scored(scorer, ["assert add(1, 2) == 3"], *programs, ADD)
    assert found[-1] == Score(1.0)
    assert [(score.value, score.note) for score in found[:-1]] == [(0.0, note) for note in programs.values()]


@needs_namespaces
def test_a_program_that_prints_what_a_passed_test_prints_gets_nothing(scorer):
    assert scored(scorer, ["assert False"], "print('0')\nimport os\nos.write(1, b'word 0\\n')")[0].value == 0.0


@needs_namespaces
def test_where_namespaces_are_forbidden_it_refuses_to_start():
    """In a user namespace that allows no further namespaces, as a strict container does."""
    program = """
        from dppo_cli.calls.worker import FindError, find_function
        try:
            find_function("reward.path", "dppo_cli.reward.functions.run_program:score")
        except FindError as error:
            print(error)
    """
    shell = 'for kind in user mnt; do echo 0 > /proc/sys/user/max_${kind}_namespaces; done; exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", shell, "sh", sys.executable, "-c"]
    done = subprocess.run(
        [*command, textwrap.dedent(program)],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line == (
        "reward=code locks programs up with namespaces of Linux 5.14 or newer, and cannot here ([Errno 28] unshare: No "
        "space left on device); use a machine or container that allows user namespaces (docs/rewards.md)"
    )


@pytest.mark.skipif(not WHY_NOT, reason="there are namespaces here")
def test_where_there_are_no_namespaces_it_refuses_to_start():
    with pytest.raises(RewardError, match="reward=code locks programs up with namespaces"):
        option().load(make.fail)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pattern", "("),
        ("max_tests", 0),
        ("timeout", 0.0),
        ("memory_mib", 1),
        ("processes", 0),
        ("disk_mib", 0),
        ("output_kib", 0),
        ("workers", 0),
    ],
)
def test_options_out_of_range(field, value):
    with pytest.raises(ConfigError, match=rf"reward\.{field}="):
        option(**{field: value})
