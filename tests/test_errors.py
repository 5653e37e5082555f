import copy
import inspect
import os
import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from enginecache import errors
from enginecache.errors import BuildError, EngineCacheError, StoreError, printable

KINDS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, EngineCacheError)]
LINE = re.compile(r"    (?P<bars>[│├└─ ]*)(?P<name>\w+Error)(?: +exit (?P<code>\d+) +\((?P<builtin>\w+)\))?")


def drawn():
    """The tree in the module's docstring: rows of name, parent, exit code and builtin."""
    path = []
    for line in errors.__doc__.splitlines():
        if match := LINE.match(line):
            depth = len(match["bars"]) // 4
            path = [*path[:depth], match["name"]]
            yield match["name"], path[-2] if depth else None, match["code"], match["builtin"]


DRAWN = list(drawn())


def test_tree_draws_every_class_once():
    assert sorted(row[0] for row in DRAWN) == sorted(kind.__name__ for kind in KINDS)


@pytest.mark.parametrize(("name", "parent", "code", "builtin"), DRAWN)
def test_tree_draws_what_is(name, parent, code, builtin):
    kind = getattr(errors, name)
    assert parent is None or getattr(errors, parent) in kind.__bases__
    assert name.endswith("Error")
    if code is None:
        assert kind.exit_code == getattr(errors, parent).exit_code
    else:
        assert kind.exit_code == int(code)
        assert builtin in {base.__name__ for base in kind.__mro__}


@pytest.mark.parametrize("given", [("what happened", "what to do"), ("what happened",)])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_what_and_then_what_to_do(kind, given):
    error = kind(*given)
    assert str(error) == "\n".join(given)
    assert (error.what, error.fix) == (given[0], given[1] if len(given) > 1 else "")
    assert kind.__doc__


def identity(error):
    return error


def same(left, right):
    return (type(left), str(left), left.args, vars(left), left.exit_code) == (
        type(right),
        str(right),
        right.args,
        vars(right),
        right.exit_code,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind):
    error = kind("what happened", "what to do")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert same(pickle.loads(pickle.dumps(error, protocol)), error), protocol
    assert same(copy.copy(error), error)


def test_errors_survive_the_way_from_another_process():
    given = [BuildError("refused", "fix it", "/logs/1.log"), StoreError("full", "free some")]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert all(same(error, back) for error, back in zip(given, pool.map(identity, given), strict=True))


def test_log_is_the_last_line_of_a_build_error():
    assert str(BuildError("refused", "fix it", "/logs/1.log")) == "refused\nfix it\nThe builder's log: /logs/1.log"
    assert str(BuildError("refused", "", "/logs/1.log")) == "refused\nThe builder's log: /logs/1.log"


def test_store_error_is_an_os_error_with_our_text_alone():
    error = StoreError("full", "free some")
    assert isinstance(error, OSError)
    assert str(error) == "full\nfree some"


def test_controls_in_text_of_others_are_escaped():
    assert printable("a\x1b[31mred\x07\tb\nc\rd\x00\x7f\x9b") == r"a\x1b[31mred\x07\tb\nc\rd\x00\x7f\x9b"
    assert printable("name\u2028\u202egnp.exe\ud800") == r"name\u2028\u202egnp.exe\ud800"
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\xe9"


def test_text_that_a_terminal_shows_is_printed_as_it_is():
    text = "größe 模型 C:\\temp 'x' é 👩‍🔬"
    assert printable(text) == text
    assert printable(printable("a\x1bb")) == printable("a\x1bb")


def test_text_of_an_error_has_a_line_for_what_and_one_for_each_line_of_advice():
    error = EngineCacheError("model 'a\nb\x1b[2J' is bad", "first \x1b\nsecond")
    assert str(error).split("\n") == [r"model 'a\nb\x1b[2J' is bad", r"first \x1b", "second"]
    assert error.what == "model 'a\nb\x1b[2J' is bad"
    assert r"\x1b.log" in str(BuildError("refused", "", "/logs/\x1b.log"))
