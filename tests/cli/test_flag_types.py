"""Test how a command line and a YAML file set flags, and which values both refuse."""

import contextlib
import tracemalloc

import pytest
import yaml

from cli.flag_reader import MAX_CONFIG_BYTES, FlagParser
from cli.flag_types import as_text, pathname
from errors import UsageError
from opts import FLAGS

ONE_OF_EACH_TYPE = "depth LR momentum data tf32 lrShape optMemory milestones printConfig inputRange"
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


# Command lines:
@pytest.mark.parametrize(
    ("line", "values"),
    [
        *((line, {"depth": 40, "tf32": False})
          for line in ("-depth 40 -tf32 false", "--depth 40 --tf32 false", "-depth=40 -tf32=false",
                       "--depth=40 --tf32=false", "--tf32 false -depth=40")),
        ("--data=a=b'\"\u00e9 --depth=3", {"data": "a=b'\"\u00e9", "depth": 3}),
        ("--inputRange -1024,1024 --depth 3", {"inputRange": [-1024, 1024], "depth": 3}),
        ("--inputRange=-1e3,-.5 -depth 3", {"inputRange": [-1000, -0.5], "depth": 3}),
        # A flag may stand alone where the table says so.
        ("--printConfig", {"printConfig": True}),
        ("--printConfig --depth 3", {"printConfig": True, "depth": 3}),
        ("--printConfig false", {"printConfig": False}),
        ("--printConfig=false", {"printConfig": False}),
    ],
)  # fmt: skip
def test_every_spelling_gives_the_same_values(line, values):
    parser = from_line(*line.split())
    assert (parser.values, parser.problems) == (values, [])


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        # A negative number is a value, not the next flag.
        *((["--LR", value], (f"LR: '{value}' is out of range", "use a number above 0"))
          for value in ("-0.1", "-1", "-.5", "-inf", "-nan")),
        (["--tf32", "--depth", "3"], ("tf32: has no value", "give true or false")),
        (["--LR="], ("LR: has no value", "give a number above 0")),
        (["--printConfig", "--data"], ("data: has no value", "give a path")),
        *(([token], (f"{token!r} is not a flag",
                     "write --flag VALUE, a list with commas; see --help"))
          for token in ("", "-", "--", "---depth", "40", "-1", "depth=40", "--=3", "a b")),
        (["--dept", "3"], ("unknown flag dept", "did you mean depth?")),
        (["--DEPTH", "3"], ("unknown flag DEPTH", "did you mean depth?")),
        (["--qqqqqq", "3"], ("unknown flag qqqqqq", "see --help")),
        # The habits of other programs, and a dash that an editor has put in.
        (["--batch-size", "3"], ("unknown flag batch-size", "did you mean batchSize?")),
        (["--weight_decay=3"], ("unknown flag weight_decay", "did you mean weightDecay?")),
        (["--no-augment"], ("unknown flag no-augment", "did you mean augment?")),
        (["--learning-rate", "1"], ("unknown flag learning-rate", "did you mean LR?")),
        (["--num_workers", "1"], ("unknown flag num_workers", "did you mean nThreads?")),
        *(([f"{dash}LR=3"], (f"'{dash}LR=3' is not a flag",
                             f"type two hyphens: '{dash}' is another character"))
          for dash in "\u2013\u2014\u2212"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_shown_with_its_fix(argv, problem):
    what, fix = problem
    assert from_line(*argv).problems == [(f"{what} (command line)", fix)]


def test_a_flag_given_twice_is_refused_and_the_first_origin_wins():
    parser = from_line("-depth", "3", "--depth=3")
    assert parser.problems == [("depth is given twice (command line; command line)", "keep one")]
    parser = from_line("--depth", "3")
    parser.add([("depth", "5", "later"), ("LR", "2", "later")])
    assert (parser.values, parser.problems) == ({"depth": 3, "LR": 2.0}, [])


# Values:
@pytest.mark.parametrize(
    ("flag", "raw", "value"),
    [
        ("depth", "+40", 40), ("depth", "010", 10), ("LR", "1e-4", 1e-4), ("LR", ".5", 0.5),
        ("LR", "3", 3.0), ("momentum", "0", 0.0), ("data", "010", "010"), ("tf32", "true", True),
        ("tf32", "false", False), ("lrShape", "cosine", "cosine"), ("optMemory", "1", 1),
        ("milestones", "5", [5]), ("milestones", "5, 6", [5, 6]), ("milestones", "[]", []),
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
        ("LR", ["fast", "1_0", " 1", "1 ", "\u0661", "1\n"], "is not a number", ABOVE_0),
        ("LR", ["0", "nan", "inf"], "is out of range", ABOVE_0),
        ("momentum", ["1"], "is out of range", "use a number of at least 0 and below 1"),
        ("tf32", ["yes", "True", "1"], "is not true or false", "use true or false"),
        ("lrShape", ["cosin"], "is not one of multistep, cosine", "use cosine"),
        ("lrShape", ["xxxx"], "is not one of multistep, cosine", "use multistep"),
        ("optMemory", ["5"], "is not one of 0, 1, 2, 3, 4, auto", "use 4"),
        ("optMemory", ["-3"], "is not one of 0, 1, 2, 3, 4, auto", "use 0"),
        (
            "optMemory",
            ["Auto", "2.0"],
            "is not a level or auto",
            " or 4 or auto",
        ),
        ("milestones", ["5,,6"], "is not whole numbers with commas between", "of at least 1"),
        ("milestones", ["5,0"], "is out of range", "of at least 1"),
    ],
)
def test_a_wrong_value_is_shown_with_what_would_be_right(flag, raws, what, fix):
    for raw in raws:
        with pytest.raises(ValueError) as caught:
            FLAGS[flag].parse(raw)
        assert caught.value.args[0] == f"{raw!r} {what}"
        assert caught.value.args[1].endswith(fix)


def test_a_long_value_is_cut_in_its_message():
    assert len(from_line("--depth", "x" * 10_000).problems[0][0]) < 120


# YAML:
@pytest.mark.parametrize("raw", TRICKY.split())
def test_yaml_means_what_the_command_line_means(raw, from_yaml):
    for flag in ONE_OF_EACH_TYPE.split():
        if raw == "~" and FLAGS[flag].type is pathname:  # the home directory, and YAML's null
            continue
        line, file = from_line(f"--{flag}={raw}"), from_yaml(f"{flag}: {raw}\n")
        assert file.values == line.values, flag
        without_source = [[what.split(" (")[0] for what, _ in r.problems] for r in (line, file)]
        assert without_source[0] == without_source[1]


def test_a_path_may_begin_with_the_home_directory(from_yaml, monkeypatch):
    monkeypatch.setenv("HOME", "/home/her")
    paths = [name for name, flag in FLAGS.items() if flag.type is pathname]
    assert set(paths) == {"data", "config", "save", "resume", "retrain"}
    for name in paths:
        want = {name: "/home/her/x y"}
        assert from_line(f"--{name}=~/x y").values == from_yaml(f"{name}: ~/x y\n").values == want
        assert from_line(f"--{name}=~").values == {name: "/home/her"}
        (problem,) = from_yaml(f"{name}: ~\n").problems  # YAML's null
        assert problem[0].startswith(f"{name} is null")
        assert from_line(f"--{name}", "a~b").values == {name: "a~b"}


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("depth: 40\nmilestones: [5, 6]\n", {"depth": 40, "milestones": [5, 6]}),
        ("milestones: []\n", {"milestones": []}),
        ("milestones:\n- 5\n- 6\n", {"milestones": [5, 6]}),
        ("# a comment\ndepth: '40' # another\n", {"depth": 40}),
        ("{depth: 40, tf32: false}", {"depth": 40, "tf32": False}),
        ("depth: &d 40\noptMemory: 1\ndata: *d\n", {"depth": 40, "optMemory": 1, "data": "40"}),
        (b"\xef\xbb\xbfdepth: 40\n", {"depth": 40}),
        ("depth: 40\r\n".encode("utf-16"), {"depth": 40}),
        (b"\xfe\xff" + "depth: 40\n".encode("utf-16-be"), {"depth": 40}),
        (b"depth: 40\r\ntf32: true\r\n", {"depth": 40, "tf32": True}),
        ("data: \u00e9\n", {"data": "\u00e9"}),
        ("paper: {table: 2, error: 3.46}\ndepth: 40\n", {"depth": 40}),
    ],
)
def test_a_yaml_file_is_read(content, values, from_yaml):
    parser = from_yaml(content)
    assert (parser.values, parser.problems) == (values, [])


def test_a_key_given_twice_is_shown_with_both_lines(from_yaml):
    assert from_yaml("depth: 3\ntf32: true\ndepth: 3\n").problems == [
        ("depth is given twice (c.yaml, line 1; c.yaml, line 3)", "keep one")
    ]


def test_an_unknown_key_is_shown_with_its_line_and_the_nearest(from_yaml):
    for value in ("3", "[3]", "{a: b}", ""):
        problems = from_yaml(f"tf32: true\nDepht: {value}\n").problems
        assert problems == [("unknown flag Depht (c.yaml, line 2)", "did you mean depth?")]


def test_every_problem_of_a_file_is_found(from_yaml):
    problems = from_yaml(
        "depth: x\nLR: -1\nonn: true\ndata: {a: b}\ntf32: yes\ntf32: no\n"
    ).problems
    whats = "\n".join(what for what, _ in problems)
    for line, part in enumerate(["depth: 'x'", "LR: '-1'", "onn", "data has", "tf32: 'yes'"], 1):
        assert part in whats and f"line {line})" in whats
    assert len(problems) == 6


@pytest.mark.parametrize(
    ("what", "contents"),
    [
        ("holds no settings", ["", "# only a comment\n", "- depth\n", "depth\n",
                               "!!python/dict {depth: 3}"]),
        ("but found another document", ["depth: 3\n---\ndepth: 3\n"]),
        ("c.yaml, line 1)", ["\tdepth: 3\n"]),
        ("c.yaml, line 2)", ["tf32: true\ndepth:\t[\n"]),
        ("undefined alias", ["depth: *missing\n"]),
        ("not YAML", ["depth: 'unclosed\n", "%YAML 9.9\n---\ndepth: 3\n", "data: \x07\n",
                      "data: caf\u00e9\n".encode("latin-1"),
                      bytes(range(256)), "[" * 1000, "depth: " + "{a: " * 1500, "- " * 1500]),
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
        ("data: [a, b]\n", "data has no plain value"),
        ("data: []\n", "data has no plain value"),
        ("depth: [40]\n", "depth has no plain value"),
        ("data: {a: b}\n", "data has no plain value"),
        ("milestones: [[5]]\n", "milestones has no plain value"),
        ("? [name]\n: a\n", "a key that is not a flag"),
        ("<<: {depth: 3}\n", "unknown flag <<"),
        *((f"data: {tag} x\n", "data has no plain value")
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
        "data: !!python/object/apply:os.mkdir [{marker}]",
        "milestones: !!python/object/apply:os.mkdir [{marker}]",
        "data: !!python/object/new:os.mkdir [{marker}]",
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
    with pytest.raises(UsageError) as error:
        UsageError.raise_for(from_yaml(f'"{key}": 1\n').problems)
    assert len(error.value.report().splitlines()) == 1
    assert error.value.report().isprintable()
