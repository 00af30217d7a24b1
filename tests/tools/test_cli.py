"""Test the shared command line of the tools: flags, arguments, main.py's flags, help, errors."""

import io
import re
import subprocess
import sys
from functools import partial

import pytest

import opts
from cli.flag_types import AT_LEAST_1, Flag, integer, text
from errors import DataError, UsageError
from helpers.run_main import ROOT
from tools import cli

FLAGS = (
    Flag("csv", text, None, "file to write", "none"),
    Flag("top", integer, 5, "how many", range=AT_LEAST_1),
)
tool = partial(cli.Tool, "usage: this", FLAGS)


def test_flags_and_arguments_are_told_apart_in_any_order():
    words = ["a.png", "--top", "3", "b.png", "-csv", "out.csv", "7"]
    command = tool(arguments="image").parse(words)
    assert command.arguments == ["a.png", "b.png", "7"]
    assert (command.options.top, command.options.csv) == (3, "out.csv")
    command = tool(arguments="image").parse(["x"])
    assert (command.options.top, command.options.csv, command.main_flags) == (5, None, [])
    assert tool(arguments="run", least=0).parse([]).arguments == []


def test_main_pys_flags_are_passed_on_unless_the_tool_has_its_own():
    words = ["x", "--depth", "40", "--top", "2", "-bottleneck=false"]
    command = tool(arguments="image", main_flags=True).parse(words)
    assert command.main_flags == ["--depth=40", "--bottleneck=false"] and command.options.top == 2
    assert opts.parse([*command.main_flags, "--reduction=1"]).depth == 40
    own = Flag("depth", text, "", "another meaning")
    command = cli.Tool("", (own,), main_flags=True).parse(["--depth", "deep"])
    assert command.options.depth == "deep" and command.main_flags == []


@pytest.mark.parametrize(
    "argv, settings, problems",
    [
        (["--top", "0", "--cvs", "x"], {"arguments": "image"},
         ["no image", "top: '0' is out of range (command line)",
          "unknown flag cvs (command line)"]),
        (["x", "--depth", "40"], {"arguments": "image"}, ["unknown flag depth (command line)"]),
        (["x"], {"arguments": "second image", "least": 2}, ["no second image"]),
        (["x.png"], {}, ["'x.png' is not a flag (command line)"]),
    ],
)  # fmt: skip
def test_all_mistakes_are_reported_at_once(argv, settings, problems):
    with pytest.raises(UsageError) as error:
        tool(**settings).parse(argv)
    lines = error.value.report().splitlines()
    assert [line.split(";")[0] for line in lines] == [f"error: {problem}" for problem in problems]


@pytest.mark.parametrize("main_flags", [False, True])
def test_help_names_every_flag_and_does_not_call_the_tool(capsys, main_flags):
    assert tool(main_flags=main_flags).run(lambda argv: 1, ["x", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: this") and "--csv" in out and "--top" in out
    assert ("--growthRate" in out) == main_flags


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        (DataError("no picture", "take one"), 3, "error: no picture; fix: take one\n"),
        (KeyboardInterrupt(), 130, ""),
        (75, 75, ""),
        (None, 0, ""),
    ],
    ids=str,
)
def test_an_error_is_a_line_and_every_outcome_an_exit_code(capsys, outcome, code, line):
    def function(argv: list[str]) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    assert tool().run(function, []) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("argv", [["--help"], []])
def test_a_closed_standard_output_ends_with_0(argv, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert tool().run(lambda argv: print("a result"), argv) == 0
    assert capsys.readouterr().err == ""


# As on Windows, with the modules and the signals that it lacks.
WINDOWS = """
import os, runpy, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in "SIGHUP SIGUSR1 SIGKILL SIGCHLD SIGPROF pthread_sigmask setitimer".split():
    delattr(signal, name)
for name in "sched_getaffinity statvfs killpg".split():
    delattr(os, name)
sys.argv = [sys.argv[1], "--help"]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
PROGRAMS = ["main", *(f"tools.{file.stem}" for file in (ROOT / "tools").glob("*.py")
                      if "__main__" in file.read_text()),
            *(f"tools.{file.parent.name}" for file in (ROOT / "tools").glob("*/__main__.py")),
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_on_windows_every_program_says_that_it_needs_linux_or_macos(program):
    run = [sys.executable, "-c", WINDOWS, program]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch("error: .*Linux or macOS.*; fix: .*WSL.*\n", done.stderr)
