"""How a command line and a YAML file give flags their values, and what both refuse."""

import contextlib
import tracemalloc

import pytest
import yaml

from cli.flag_reader import MAX_CONFIG_BYTES, FlagParser
from cli.flag_types import (
    AT_LEAST_1,
    NON_NEGATIVE,
    POSITIVE,
    Flag,
    Range,
    as_text,
    boolean,
    closest_match,
    integer,
    integers,
    number,
    text,
)
from errors import UsageError

FLAGS = {
    flag.name: flag
    for flag in (
        Flag("depth", integer, 1, "", range=AT_LEAST_1),
        Flag("rate", number, 0.1, "", range=POSITIVE),
        Flag("share", number, 0.5, "", range=Range(0, 1, high_open=True)),
        Flag("name", text, "a", ""),
        Flag("on", boolean, True, ""),
        Flag("shape", text, "multistep", "", choices=("multistep", "cosine")),
        Flag("level", integer, 0, "", choices=(0, 1)),
        Flag("cuts", integers, None, "", range=AT_LEAST_1),
        Flag("show", boolean, False, "", const="true"),
    )
}
# Scalars that YAML's own rules, or Python's, would turn into something else.
TRICKY = (
    "1e-4 1e4 1E-4 .5 5. 010 0x10 0o10 1_000 12:30 +7 -7 -0.1 yes no on off y true True TRUE false "
    "null ~ .nan .inf nan inf -inf 2001-01-01 = << 1.0 40 0 1 2 cosine cosin multistep 5,6 5,,6 x"
)


def from_line(*argv: str) -> FlagParser:
    parser = FlagParser(FLAGS)
    parser.add(parser.parse_argv(list(argv)))
    return parser


@pytest.fixture
def from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(content: str | bytes) -> FlagParser:
        path = tmp_path / "c.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        parser = FlagParser(FLAGS)
        parser.add(parser.parse_yaml(path.relative_to(tmp_path)))
        assert all(what and fix for what, fix in parser.problems)
        return parser

    return read


# -------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ("line", "values"),
    [
        *((line, {"depth": 40, "on": False})
          for line in ("-depth 40 -on false", "--depth 40 --on false", "-depth=40 -on=false",
                       "--depth=40 --on=false", "--on false -depth=40")),
        ("--name=a=b'\"\u00e9 --depth=3", {"name": "a=b'\"\u00e9", "depth": 3}),
        # A flag may stand alone where the table says so.
        ("--show", {"show": True}),
        ("--show --depth 3", {"show": True, "depth": 3}),
        ("--show false", {"show": False}),
        ("--show=false", {"show": False}),
    ],
)  # fmt: skip
def test_every_spelling_gives_the_same_values(line, values):
    parser = from_line(*line.split())
    assert (parser.values, parser.problems) == (values, [])


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        # A negative number is a value, not the next flag.
        *((["--rate", value], (f"rate: '{value}' is out of range", "use a number above 0"))
          for value in ("-0.1", "-1", "-.5", "-inf", "-nan")),
        (["--on", "--depth", "3"], ("on: has no value", "give true or false")),
        (["--rate="], ("rate: has no value", "give a number above 0")),
        (["--show", "--name"], ("name: has no value", "give text")),
        *(([token], (f"{token!r} is no flag", "write --flag VALUE; see --help"))
          for token in ("", "-", "--", "---depth", "40", "-1", "depth=40", "--=3", "a b")),
        (["--dept", "3"], ("unknown flag dept", "did you mean depth?")),
        (["--DEPTH", "3"], ("unknown flag DEPTH", "did you mean depth?")),
        (["--qqqqqq", "3"], ("unknown flag qqqqqq", "see --help")),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_shown_with_its_fix(argv, problem):
    what, fix = problem
    assert from_line(*argv).problems == [(f"{what} (command line)", fix)]


def test_a_flag_given_twice_is_refused_and_the_first_origin_wins():
    parser = from_line("-depth", "3", "--depth=3")
    assert parser.problems == [("depth is given twice (command line; command line)", "keep one")]
    parser = from_line("--depth", "3")
    parser.add([("depth", "5", "later"), ("rate", "2", "later")])
    assert (parser.values, parser.problems) == ({"depth": 3, "rate": 2.0}, [])


# --------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("flag", "raw", "value"),
    [
        ("depth", "+40", 40), ("depth", "010", 10), ("rate", "1e-4", 1e-4), ("rate", ".5", 0.5),
        ("rate", "3", 3.0), ("share", "0", 0.0), ("name", "010", "010"), ("on", "true", True),
        ("on", "false", False), ("shape", "cosine", "cosine"), ("level", "1", 1),
        ("cuts", "5", [5]), ("cuts", "5, 6", [5, 6]), ("cuts", "[]", []),
    ],
)  # fmt: skip
def test_a_text_is_read_as_its_flags_type(flag, raw, value):
    parsed = FLAGS[flag].parse(raw)
    assert parsed == value and type(parsed) is type(value)
    assert FLAGS[flag].parse(as_text(parsed)) == value


WHOLE, ABOVE_0 = "use a whole number of at least 1", "use a number above 0"


@pytest.mark.parametrize(
    ("flag", "raws", "what", "fix"),
    [
        ("depth", ["4.0", "1e2", "12:30", "9" * 41], "is not a whole number", WHOLE),
        ("depth", ["0", "-1"], "is out of range", WHOLE),
        # Digits of other scripts, spaces and underscores, which int() or float() would accept.
        ("depth", ["1_0", " 1", "1 ", "\u0661", "1\n"], "is not a whole number", WHOLE),
        ("rate", ["fast", "1_0", " 1", "1 ", "\u0661", "1\n"], "is not a number", ABOVE_0),
        ("rate", ["0", "nan", "inf"], "is out of range", ABOVE_0),
        ("share", ["1"], "is out of range", "use a number of at least 0 and below 1"),
        ("on", ["yes", "True", "1"], "is not true or false", "use true or false"),
        ("shape", ["cosin"], "is not one of multistep, cosine", "use cosine"),
        ("shape", ["xxxx"], "is not one of multistep, cosine", "use multistep"),
        ("level", ["5"], "is not one of 0, 1", "use 1"),
        ("level", ["-3"], "is not one of 0, 1", "use 0"),
        ("cuts", ["5,,6"], "is not whole numbers with commas between", "of at least 1"),
        ("cuts", ["5,0"], "is out of range", "of at least 1"),
    ],
)
def test_a_wrong_value_is_shown_with_what_would_be_right(flag, raws, what, fix):
    for raw in raws:
        with pytest.raises(ValueError) as caught:
            FLAGS[flag].parse(raw)
        assert caught.value.args[0] == f"{raw!r} {what}"
        assert caught.value.args[1].endswith(fix)


def test_a_long_value_is_cut_in_its_message():
    with pytest.raises(ValueError) as caught:
        FLAGS["depth"].parse("x" * 10_000)
    assert len(caught.value.args[0]) < 100


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        (NON_NEGATIVE, [0, 5], [-1, float("inf"), float("nan")], "of at least 0"),
        (POSITIVE, [1e-300], [0, -1], "above 0"),
        (Range(0, 1, low_open=True), [1e-9, 1], [0, 1.5], "above 0 and of at most 1"),
        (Range(0, 1, high_open=True), [0, 0.99], [1, -0.1], "of at least 0 and below 1"),
        (Range(high=3), [-9, 3], [4, -float("inf")], "of at most 3"),
    ],
)
def test_a_range_says_what_it_holds(interval, inside, outside, words):
    assert all(value in interval for value in inside)
    assert not any(value in interval for value in outside)
    assert str(interval) == words


def test_the_closest_name_ignores_case_and_forgives_a_slip():
    for name, found in (("growthrate", "growthRate"), ("lr", "LR"), ("netype", "netType")):
        assert closest_match(name, ["growthRate", "LR", "netType"]) == found
    assert closest_match("zzz", ["growthRate"]) is closest_match("", ["growthRate"]) is None


# ------------------------------------------------------------------------------------------ YAML


@pytest.mark.parametrize("raw", TRICKY.split())
def test_yaml_means_what_the_command_line_means(raw, from_yaml):
    for flag in FLAGS:
        line, file = from_line(f"--{flag}={raw}"), from_yaml(f"{flag}: {raw}\n")
        assert file.values == line.values, flag
        without_source = [[what.split(" (")[0] for what, _ in r.problems] for r in (line, file)]
        assert without_source[0] == without_source[1]


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("depth: 40\ncuts: [5, 6]\n", {"depth": 40, "cuts": [5, 6]}),
        ("cuts: []\n", {"cuts": []}),
        ("cuts:\n- 5\n- 6\n", {"cuts": [5, 6]}),
        ("# a remark\ndepth: '40' # another\n", {"depth": 40}),
        ("{depth: 40, on: false}", {"depth": 40, "on": False}),
        ("depth: &d 40\nlevel: 1\nname: *d\n", {"depth": 40, "level": 1, "name": "40"}),
        (b"\xef\xbb\xbfdepth: 40\n", {"depth": 40}),
        (b"depth: 40\r\non: true\r\n", {"depth": 40, "on": True}),
        ("name: \u00e9\n", {"name": "\u00e9"}),
        ("paper: {table: 2, error: 3.46}\ndepth: 40\n", {"depth": 40}),
    ],
)
def test_a_yaml_file_is_read(content, values, from_yaml):
    parser = from_yaml(content)
    assert (parser.values, parser.problems) == (values, [])


def test_a_key_given_twice_is_shown_with_both_lines(from_yaml):
    assert from_yaml("depth: 3\non: true\ndepth: 3\n").problems == [
        ("depth is given twice (c.yaml, line 1; c.yaml, line 3)", "keep one")
    ]


@pytest.mark.parametrize("value", ["3", "[3]", "{a: b}", ""])
def test_an_unknown_key_is_shown_with_its_line_and_the_nearest(value, from_yaml):
    assert from_yaml(f"on: true\nDepht: {value}\n").problems == [
        ("unknown flag Depht (c.yaml, line 2)", "did you mean depth?")
    ]


def test_every_problem_of_a_file_is_found(from_yaml):
    problems = from_yaml("depth: x\nrate: -1\nonn: true\nname: {a: b}\non: yes\non: no\n").problems
    whats = "\n".join(what for what, _ in problems)
    for line, part in enumerate(["depth: 'x'", "rate: '-1'", "onn", "name has", "on: 'yes'"], 1):
        assert part in whats and f"line {line})" in whats
    assert len(problems) == 6


@pytest.mark.parametrize(
    ("what", "contents"),
    [
        ("holds no settings", ["", "# only a remark\n", "- depth\n", "depth\n",
                               "!!python/dict {depth: 3}"]),
        ("but found another document", ["depth: 3\n---\ndepth: 3\n"]),
        ("c.yaml, line 1)", ["\tdepth: 3\n"]),
        ("c.yaml, line 2)", ["on: true\ndepth:\t[\n"]),
        ("undefined alias", ["depth: *missing\n"]),
        ("not YAML", ["depth: 'unclosed\n", "%YAML 9.9\n---\ndepth: 3\n", "name: \x07\n",
                      "name: caf\u00e9\n".encode("latin-1"), "depth: 3\n".encode("utf-16"),
                      bytes(range(256)), "[" * 4000, "depth: " + "{a: " * 2000, "- " * 4000]),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_settings_is_one_problem(what, contents, from_yaml):
    for content in contents:
        parser = from_yaml(content)
        ((found, fix),) = parser.problems
        assert what in found and "c.yaml" in found
        assert fix == "write one `flag: value` a line"
        assert parser.values == {}


@pytest.mark.parametrize("name", ["absent.yaml", ".", "x" * 300, "c.yaml/c.yaml", "long.yaml"])
def test_a_file_that_cannot_be_read_is_one_problem(name, tmp_path):
    (tmp_path / "c.yaml").touch()
    (tmp_path / "long.yaml").write_text("#" * (MAX_CONFIG_BYTES + 1))
    parser = FlagParser(FLAGS)
    assert parser.parse_yaml(tmp_path / name) == []
    ((what, fix),) = parser.problems
    assert what.startswith(f"cannot read config {tmp_path / name}: ")
    assert fix == "name a readable YAML file"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("name: [a, b]\n", "name has no plain value"),
        ("name: []\n", "name has no plain value"),
        ("depth: [40]\n", "depth has no plain value"),
        ("name: {a: b}\n", "name has no plain value"),
        ("cuts: [[5]]\n", "cuts has no plain value"),
        ("? [name]\n: a\n", "a key that is no flag"),
        ("<<: {depth: 3}\n", "unknown flag <<"),
        *((f"name: {tag} x\n", "name has no plain value")
          for tag in ("!!python/name:os.system", "!!int", "!mine", "!!binary")),
    ],
)  # fmt: skip
def test_a_structure_or_a_tag_where_one_value_belongs_is_refused(content, what, from_yaml):
    parser = from_yaml(content)
    assert parser.values == {}
    assert [found for found, _ in parser.problems] == [f"{what} (c.yaml, line 1)"]


@pytest.mark.parametrize(
    "payload",
    [
        "name: !!python/object/apply:os.mkdir [{marker}]",
        "cuts: !!python/object/apply:os.mkdir [{marker}]",
        "name: !!python/object/apply:os.mkdir {{args: [{marker}]}}",
        "name: !!python/object/new:os.mkdir [{marker}]",
        "? !!python/object/apply:os.mkdir [{marker}]\n: 1",
        "!!python/object/apply:os.mkdir [{marker}]",
    ],
)
def test_a_python_tag_is_refused_and_runs_nothing(payload, from_yaml, tmp_path):
    marker = tmp_path / "marker"
    payload = payload.format(marker=marker)
    parser = from_yaml(payload)
    assert not marker.exists()
    assert len(parser.problems) == 1 and parser.values == {}
    # A reader that trusts tags does run this payload.
    with contextlib.suppress(yaml.YAMLError):
        yaml.unsafe_load(payload)
    assert marker.exists()


@pytest.mark.parametrize("last", ["depth: *a14", "? *a14\n: 1", "<<: *a14"])
def test_an_alias_bomb_costs_no_memory(last, from_yaml):
    # Written out it would be 2^15 scalars; each level more doubles that.
    bomb = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 15))
    tracemalloc.start()
    try:
        parser = from_yaml(f"a0: &a0 [x, x]\n{bomb}{last}\n")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert parser.values == {} and len(parser.problems) == 16
    assert peak < 2**20


@pytest.mark.parametrize("key", ["a\\nb", "a\\rb", "a\\eb", "a\\x85b", "a\\u2028b", "a\\ud800b"])
def test_each_problem_is_one_printable_line_whatever_a_key_holds(key, from_yaml):
    error = UsageError.from_problems(from_yaml(f'"{key}": 1\n').problems)
    assert len(error.report().splitlines()) == 1
    assert error.report().isprintable()
