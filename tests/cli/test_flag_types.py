"""How a command line and a YAML file give flags their values, and what both refuse."""

import contextlib
import tracemalloc

import pytest
import yaml

from cli.flag_reader import FlagParser
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
def from_yaml(tmp_path):
    def read(content: str | bytes) -> FlagParser:
        path = tmp_path / "c.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        parser = FlagParser(FLAGS)
        parser.add(parser.parse_yaml(path))
        for what, fix in parser.problems:
            assert what and fix
        return parser

    return read


# -------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    "argv",
    [
        ["-depth", "40", "-on", "false"],
        ["--depth", "40", "--on", "false"],
        ["-depth=40", "-on=false"],
        ["--depth=40", "--on=false"],
        ["--on", "false", "-depth=40"],
    ],
)
def test_every_spelling_gives_the_same_values(argv):
    parser = from_line(*argv)
    assert parser.values == {"depth": 40, "on": False}
    assert parser.problems == []


@pytest.mark.parametrize("value", ["-0.1", "-1", "-.5", "-inf", "-nan"])
def test_a_negative_number_is_a_value_and_not_the_next_flag(value):
    ((what, fix),) = from_line("--rate", value).problems
    assert what == f"rate: '{value}' is out of range (command line)"
    assert fix == "use a number above 0"


def test_a_flag_that_another_flag_follows_has_no_value():
    parser = from_line("--on", "--depth", "3", "--rate=", "-name")
    assert parser.values == {"depth": 3}
    assert parser.problems == [
        ("on: has no value (command line)", "give true or false"),
        ("rate: has no value (command line)", "give a number above 0"),
        ("name: has no value (command line)", "give text"),
    ]


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--show"], True),
        (["--show", "--depth", "3"], True),
        (["--show", "false"], False),
        (["--show=false"], False),
        (["--show", "true"], True),
    ],
)
def test_a_flag_may_stand_alone_only_where_the_table_says_so(argv, shown):
    parser = from_line(*argv)
    assert parser.values["show"] is shown
    assert parser.problems == []


@pytest.mark.parametrize(
    "token", ["", "-", "--", "---depth", "40", "-1", "depth=40", "--=3", "a b"]
)
def test_a_token_that_is_no_flag_is_shown(token):
    assert from_line(token).problems == [
        (f"{token!r} is no flag (command line)", "write --flag VALUE; see --help")
    ]


def test_values_keep_every_character():
    value = "a=b --c\nd\t'\"é"
    assert from_line(f"--name={value}", "--depth=3").values == {"name": value, "depth": 3}


@pytest.mark.parametrize(
    ("raw", "fix"),
    [
        ("dept", "did you mean depth?"),
        ("DEPTH", "did you mean depth?"),
        ("dpeth", "did you mean depth?"),
        ("qqqqqq", "see --help"),
    ],
)
def test_an_unknown_or_shortened_flag_names_the_nearest(raw, fix):
    parser = from_line(f"--{raw}", "3")
    assert parser.values == {}
    assert parser.problems == [(f"unknown flag {raw} (command line)", fix)]


def test_a_flag_given_twice_is_refused_even_with_equal_values():
    parser = from_line("-depth", "3", "--depth=3")
    assert parser.problems == [("depth is given twice (command line; command line)", "keep one")]


def test_what_an_earlier_origin_gave_stays():
    parser = from_line("--depth", "3")
    parser.add([("depth", "5", "later"), ("rate", "2", "later")])
    assert parser.values == {"depth": 3, "rate": 2.0}
    assert parser.problems == []


# --------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("flag", "raw", "value"),
    [
        ("depth", "40", 40),
        ("depth", "+40", 40),
        ("depth", "010", 10),
        ("rate", "1e-4", 1e-4),
        ("rate", ".5", 0.5),
        ("rate", "3", 3.0),
        ("share", "0", 0.0),
        ("name", "010", "010"),
        ("on", "true", True),
        ("on", "false", False),
        ("shape", "cosine", "cosine"),
        ("level", "1", 1),
        ("cuts", "5", [5]),
        ("cuts", "5,6", [5, 6]),
        ("cuts", "5, 6", [5, 6]),
        ("cuts", "[]", []),
    ],
)
def test_a_text_is_read_as_its_flags_type(flag, raw, value):
    read = FLAGS[flag].parse(raw)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("flag", "raw", "what", "fix"),
    [
        ("depth", "4.0", "'4.0' is not a whole number", "use a whole number of at least 1"),
        ("depth", "1e2", "'1e2' is not a whole number", "use a whole number of at least 1"),
        ("depth", "12:30", "'12:30' is not a whole number", "use a whole number of at least 1"),
        ("depth", "0", "'0' is out of range", "use a whole number of at least 1"),
        ("depth", "9" * 41, "is not a whole number", "use a whole number of at least 1"),
        ("rate", "fast", "'fast' is not a number", "use a number above 0"),
        ("rate", "0", "'0' is out of range", "use a number above 0"),
        ("rate", "nan", "'nan' is out of range", "use a number above 0"),
        ("rate", "inf", "'inf' is out of range", "use a number above 0"),
        ("share", "1", "'1' is out of range", "use a number of at least 0 and below 1"),
        ("on", "yes", "'yes' is not true or false", "use true or false"),
        ("on", "True", "'True' is not true or false", "use true or false"),
        ("on", "1", "'1' is not true or false", "use true or false"),
        ("shape", "cosin", "'cosin' is not one of multistep, cosine", "use cosine"),
        ("shape", "xxxx", "'xxxx' is not one of multistep, cosine", "use multistep"),
        ("level", "5", "'5' is not one of 0, 1", "use 1"),
        ("level", "-3", "'-3' is not one of 0, 1", "use 0"),
        ("cuts", "5,,6", "'5,,6' is not whole numbers with commas between", "of at least 1"),
        ("cuts", "5,0", "'5,0' is out of range", "of at least 1"),
    ],
)
def test_a_wrong_value_is_shown_with_what_would_be_right(flag, raw, what, fix):
    with pytest.raises(ValueError) as caught:
        FLAGS[flag].parse(raw)
    assert what in caught.value.args[0]
    assert fix in caught.value.args[1]


@pytest.mark.parametrize("raw", ["1_0", " 1", "1 ", "\u0661", "1\n"])
def test_numbers_are_plain_digits_for_fractions_as_for_whole_numbers(raw):
    for flag in ("depth", "rate"):
        with pytest.raises(ValueError) as caught:
            FLAGS[flag].parse(raw)
        assert "is not a" in caught.value.args[0], flag


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


@pytest.mark.parametrize(
    ("name", "found"),
    [("growthrate", "growthRate"), ("lr", "LR"), ("netype", "netType"), ("zzz", None), ("", None)],
)
def test_nearest_ignores_case_and_forgives_a_slip(name, found):
    assert closest_match(name, ["growthRate", "LR", "netType"]) == found


@pytest.mark.parametrize(
    ("flag", "value"),
    [("depth", 3), ("rate", 1e-4), ("on", False), ("cuts", [1, 2]), ("cuts", []), ("name", "x")],
)
def test_a_setting_as_text_reads_as_itself(flag, value):
    assert FLAGS[flag].parse(as_text(value)) == value


# ------------------------------------------------------------------------------------------ YAML


@pytest.mark.parametrize("raw", TRICKY.split())
def test_yaml_means_what_the_command_line_means(raw, from_yaml):
    for flag in FLAGS:
        line, file = from_line(f"--{flag}={raw}"), from_yaml(f"{flag}: {raw}\n")
        assert file.values == line.values, flag
        without_source = [[what.split(" (")[0] for what, _ in r.problems] for r in (line, file)]
        assert without_source[0] == without_source[1]


def test_yaml_alone_would_have_meant_something_else():
    # The twin of the test above: these are not values on which any reader would agree.
    assert [yaml.safe_load(word) for word in ("010", "12:30", "yes")] == [8, 750, True]
    assert isinstance(yaml.safe_load("1e-4"), str)


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
        ("name: é\n", {"name": "é"}),
        ("paper: {table: 2, error: 3.46}\ndepth: 40\n", {"depth": 40}),
    ],
)
def test_a_yaml_file_is_read(content, values, from_yaml):
    parser = from_yaml(content)
    assert parser.values == values
    assert parser.problems == []


def test_a_key_given_twice_is_shown_with_both_lines(from_yaml, tmp_path):
    path = tmp_path / "c.yaml"
    assert from_yaml("depth: 3\non: true\ndepth: 3\n").problems == [
        (f"depth is given twice ({path}, line 1; {path}, line 3)", "keep one")
    ]


@pytest.mark.parametrize("value", ["3", "[3]", "{a: b}", ""])
def test_an_unknown_key_is_shown_with_its_line_and_the_nearest(value, from_yaml, tmp_path):
    assert from_yaml(f"on: true\nDepht: {value}\n").problems == [
        (f"unknown flag Depht ({tmp_path / 'c.yaml'}, line 2)", "did you mean depth?")
    ]


def test_every_problem_of_a_file_is_found(from_yaml):
    problems = from_yaml("depth: x\nrate: -1\nonn: true\nname: {a: b}\non: yes\non: no\n").problems
    whats = "\n".join(what for what, _ in problems)
    for number_, part in enumerate(["depth: 'x'", "rate: '-1'", "onn", "name has", "on: 'yes'"], 1):
        assert part in whats
        assert f"line {number_})" in whats
    assert len(problems) == 6


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "holds no settings"),
        ("# only a remark\n", "holds no settings"),
        ("- depth\n", "holds no settings"),
        ("depth\n", "holds no settings"),
        ("!!python/dict {depth: 3}", "holds no settings"),
        ("depth: 3\n---\ndepth: 3\n", "but found another document"),
        ("\tdepth: 3\n", "line 1"),
        ("on: true\ndepth:\t[\n", "line 2"),
        ("depth: *nobody\n", "undefined alias"),
        ("depth: 'unclosed\n", "not YAML"),
        ("%YAML 9.9\n---\ndepth: 3\n", "not YAML"),
        ("name: \x07\n", "not YAML"),
        ("name: café\n".encode("latin-1"), "not YAML"),
        ("depth: 3\n".encode("utf-16"), "not YAML"),
        (bytes(range(256)), "not YAML"),
        ("[" * 16_000, "not YAML"),
        ("depth: " + "{a: " * 4000, "not YAML"),
        ("- " * 8000, "not YAML"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_file_that_holds_no_settings_is_one_problem(content, what, from_yaml):
    parser = from_yaml(content)
    ((found, fix),) = parser.problems
    assert what in found
    assert "c.yaml" in found
    assert fix == "write one `flag: value` a line"
    assert parser.values == {}


@pytest.mark.parametrize("name", ["absent.yaml", ".", "x" * 300, "c.yaml/c.yaml"])
def test_a_file_that_cannot_be_read_is_one_problem(name, tmp_path):
    (tmp_path / "c.yaml").touch()
    parser = FlagParser(FLAGS)
    assert parser.parse_yaml(tmp_path / name) == []
    ((what, fix),) = parser.problems
    assert what.startswith(f"cannot read config {tmp_path / name}: ")
    assert fix == "name a readable YAML file"


@pytest.mark.parametrize(
    "content",
    [
        "name: [a, b]\n",
        "name: []\n",
        "depth: [40]\n",
        "name: {a: b}\n",
        "cuts: [[5]]\n",
        "? [name]\n: a\n",
        "<<: {depth: 3}\n",
    ],
)
def test_a_structure_where_one_value_belongs_is_refused(content, from_yaml):
    parser = from_yaml(content)
    assert parser.values == {}
    assert len(parser.problems) == 1


@pytest.mark.parametrize(
    "payload",
    [
        "name: !!python/object/apply:os.mkdir [{marker}]",
        "cuts: !!python/object/apply:os.mkdir [{marker}]",
        "name: !!python/object/apply:os.mkdir {{args: [{marker}]}}",
        "name: !!python/object/new:os.mkdir [{marker}]",
        "? !!python/object/apply:os.mkdir [{marker}]\n: 1",
        "!!python/object/apply:os.mkdir [{marker}]",
        "name: [!!python/object/apply:os.mkdir [{marker}]]",
    ],
)
def test_a_python_tag_is_refused_and_runs_nothing(payload, from_yaml, tmp_path):
    marker = tmp_path / "marker"
    payload = payload.format(marker=marker)
    parser = from_yaml(payload)
    assert not marker.exists()
    assert len(parser.problems) == 1
    assert parser.values == {}
    # The twin: a reader that trusts tags does run this payload.
    with contextlib.suppress(yaml.YAMLError):
        yaml.unsafe_load(payload)
    assert marker.exists()


@pytest.mark.parametrize("tag", ["!!python/name:os.system", "!!int", "!mine", "!!binary"])
def test_a_scalar_with_a_tag_of_its_own_is_refused(tag, from_yaml):
    ((what, _),) = from_yaml(f"name: {tag} x\n").problems
    assert what.startswith("name has no plain value")


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
    assert parser.values == {}
    assert len(parser.problems) == 16
    assert peak < 2**20


@pytest.mark.parametrize("key", ["a\\nb", "a\\rb", "a\\eb", "a\\x85b", "a\\u2028b", "a\\ud800b"])
def test_each_problem_is_one_printable_line_whatever_a_key_holds(key, from_yaml):
    error = UsageError.from_problems(from_yaml(f'"{key}": 1\n').problems)
    assert len(error.report().splitlines()) == 1
    assert error.report().isprintable()
