"""What the command lines of tools share: flags, operands, main.py's flags, help, errors."""

import io
import sys

import pytest

import opts
from cli.flag_types import AT_LEAST_1, Flag, integer, text
from errors import DataError, UsageError
from tools import cli

FLAGS = {
    flag.name: flag
    for flag in (
        Flag("csv", text, None, "file to write", "none"),
        Flag("top", integer, 5, "how many", range=AT_LEAST_1),
    )
}


def test_operands_stand_between_flags_and_keep_their_order():
    words = ["a.png", "--top", "3", "b.png", "-csv", "out.csv", "7"]
    asked = cli.read(words, FLAGS, arguments="image")
    assert asked.arguments == ["a.png", "b.png", "7"]
    assert (asked.options.top, asked.options.csv) == (3, "out.csv")


def test_flags_that_are_not_given_have_their_defaults():
    asked = cli.read(["x"], FLAGS, arguments="image")
    assert (asked.options.top, asked.options.csv, asked.main_flags) == (5, None, [])


def test_the_networks_flags_are_passed_on_as_main_py_takes_them():
    words = ["x", "--depth", "40", "--top", "2", "-bottleneck=false"]
    asked = cli.read(words, FLAGS, arguments="image", main_flags=True)
    assert asked.main_flags == ["--depth=40", "--bottleneck=false"] and asked.options.top == 2
    assert opts.parse([*asked.main_flags, "--reduction=1"]).depth == 40
    with pytest.raises(UsageError, match="unknown flag depth"):
        cli.read(words, FLAGS, arguments="image")


def test_a_flag_of_the_tools_own_hides_that_of_main_py():
    own = {"depth": Flag("depth", text, "", "another meaning")}
    asked = cli.read(["--depth", "deep"], own, main_flags=True)
    assert asked.options.depth == "deep" and asked.main_flags == []


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UsageError) as error:
        cli.read(["--top", "0", "--cvs", "x"], FLAGS, arguments="image")
    lines = error.value.report().splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "error: no image",
        "error: top: '0' is out of range (command line)",
        "error: unknown flag cvs (command line)",
    ]
    assert "did you mean csv?" in lines[2]


def test_operands_are_a_mistake_where_none_are_taken():
    assert cli.read([], FLAGS).arguments == []
    with pytest.raises(UsageError, match=r"'x\.png' is no flag"):
        cli.read(["x.png"], FLAGS)


@pytest.mark.parametrize("network, shown", [(False, False), (True, True)])
def test_help_names_every_flag_and_does_no_work(capsys, network, shown):
    def work(argv: list[str]) -> None:
        raise AssertionError("worked")

    assert cli.run(["x", "--help"], "usage: this", FLAGS, work, network) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: this") and "--csv" in out and "--top" in out
    assert ("--growthRate" in out) == shown


def test_an_error_is_a_line_and_its_exit_code(capsys):
    def work(argv: list[str]) -> int:
        if argv:
            raise DataError("no picture", "take one")
        return 75

    assert cli.run([], "", FLAGS, work) == 75
    assert cli.run(["x"], "", FLAGS, work) == DataError.code
    assert capsys.readouterr().err == "error: no picture; fix: take one\n"
    assert cli.run([], "", FLAGS, lambda argv: None) == 0


def test_ctrl_c_ends_a_tool_without_a_traceback(capsys):
    def work(argv: list[str]) -> None:
        raise KeyboardInterrupt

    assert cli.run([], "", FLAGS, work) == 130
    assert capsys.readouterr().err == ""


def test_operands_that_may_be_left_out():
    assert cli.read([], FLAGS, arguments="run", least=0).arguments == []
    assert cli.read(["x"], FLAGS, arguments="run", least=0).arguments == ["x"]


def test_a_reader_that_has_gone_is_no_error(monkeypatch, capsys):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert cli.run(["--help"], "usage: this", FLAGS, lambda argv: 1) == 0
    monkeypatch.setattr(sys, "stdout", Gone())
    assert cli.run([], "", FLAGS, lambda argv: print("a result")) == 0
    assert capsys.readouterr().err == ""
