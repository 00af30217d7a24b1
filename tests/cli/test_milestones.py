"""Test cli/milestones.py and cli/config_files.py: which milestones a run has, and what is said."""

import pytest
import yaml

import opts
from cli.flag_reader import FlagParser
from cli.milestones import describe_rates, follow_length
from errors import UsageError

RESNET, PHOTOGRAPHS = "--netType resnet", "--dataset imagenet"


def parse(line: str):
    return opts.parse(line.split())


@pytest.mark.parametrize(
    ("saved", "default", "trained", "num_epochs", "kept"),
    [
        ([150, 225], [300, 450], 0, 600, [300, 450]),
        ([150, 225], [300, 450], 149, 600, [300, 450]),
        ([150, 225], [300, 450], 150, 600, [150, 450]),
        ([150, 225], [300, 450], 300, 600, [150, 225]),
        ([150, 225], [60, 90], 100, 120, [101, 101]),  # late for both: at once
        ([150, 225], [85, 128], 160, 170, [150, 161]),
        ([150, 225], [60, 90], 120, 120, []),  # nothing is left to train
        ([31, 61], [31, 61, 91], 70, 100, [31, 61, 91]),
        ([], [31, 61], 20, 90, [31, 61]),
    ],
)
def test_milestones_follow_the_length_unless_they_are_passed(
    saved, default, trained, num_epochs, kept
):
    assert follow_length(saved, default, trained, num_epochs) == kept
    assert kept == sorted(kept)


def test_the_rates_are_named_from_each_milestone_on():
    assert describe_rates(0.1, [150, 225], 300) == "LR 0.01 from epoch 150, 0.001 from epoch 225"
    assert describe_rates(0.2, [7, 7, 9], 8) == "LR 0.002 from epoch 7"
    assert describe_rates(0.1, [9], 8) == describe_rates(0.1, [], 8) == "LR 0.1 in every epoch"


@pytest.mark.parametrize(
    ("line", "rates"),
    [
        ("--nEpochs 1", "0.001"),
        ("--nEpochs 2", "0.01 and 0.001"),
        ("--nEpochs 3", None),
        ("--nEpochs 1 --LR 0.5", "0.005"),
        (f"--nEpochs 1 {RESNET}", "0.001"),
        (f"--nEpochs 2 {RESNET}", "0.01 and 0.001"),
        (f"--nEpochs 3 {RESNET}", None),
        (f"--nEpochs 1 {PHOTOGRAPHS}", None),
        ("--nEpochs 1 --lrShape cosine", None),
        ("--nEpochs 1 --milestones 1", None),
    ],
)
def test_a_very_short_run_says_at_which_rate_it_trains(line, rates):
    opt = parse(line)
    assert len(opt.start_notes) == (rates is not None)
    if rates:
        (note,) = opt.start_notes
        start = f"nEpochs {opt.nEpochs} trains at LR {rates}: its milestones are "
        assert note.startswith(start)
        assert note.endswith(f'; --milestones "[]" trains at {opt.LR:g}')
        assert parse(f"{line} --milestones []").milestones == []
        assert parse(f"{line} --milestones []").start_notes == []


# The record of defaults in a config.yaml:
def written(tmp_path, line: str, without: str = "nothing") -> str:
    """Write the config.yaml of a run, as it is or as older versions did; return its flag."""
    text = opts.as_yaml(parse(line), exclude=opts.NOT_SAVED)
    kept = (row for row in text.splitlines() if not row.startswith(without))
    (tmp_path / "config.yaml").write_text("\n".join(kept))
    return f"--config {tmp_path / 'config.yaml'}"


FOLLOW = "milestones follow nEpochs {}: LR "
STAY = "milestones of the config stay with nEpochs {}: LR "


@pytest.mark.parametrize(
    ("first", "record", "line", "milestones", "note"),
    [
        ("--nEpochs 10", True, "", [5, 8], None),
        ("--nEpochs 10", True, "--nEpochs 10", [5, 8], None),
        ("--nEpochs 10", True, "--nEpochs 300", [150, 225], FOLLOW),
        ("--nEpochs 10", True, "--nEpochs 1", [1, 1], FOLLOW),
        ("--nEpochs 10", True, "--nEpochs 300 --milestones 9", [9], None),
        ("--nEpochs 10", True, "--lrShape cosine", None, None),
        ("--nEpochs 10 --milestones 5,8", True, "--nEpochs 300", [5, 8], STAY),
        ("--nEpochs 10 --lrShape cosine", True, "--nEpochs 300", None, None),
        ("--nEpochs 10", False, "--nEpochs 300", [5, 8], STAY),
        ("--nEpochs 10", False, "", [5, 8], None),
        (f"--nEpochs 10 {RESNET}", True, "--nEpochs 164", [81, 122], FOLLOW),
        (f"--nEpochs 30 {PHOTOGRAPHS}", True, "--nEpochs 90", [31, 61], FOLLOW),
    ],
)
def test_a_config_of_another_length_says_what_becomes_of_its_milestones(
    tmp_path, first, record, line, milestones, note
):
    flag = written(tmp_path, first, "nothing" if record else "defaults:")
    opt = parse(f"{flag} {line}")
    assert opt.milestones == milestones
    assert [text[: text.index("LR ") + 3] for text in opt.start_notes] == (
        [note.format(opt.nEpochs)] if note else []
    )
    if record:  # what nobody has chosen, now or before
        again = yaml.safe_load(opts.as_yaml(opt))["defaults"]
        is_default = "--milestones" not in first + line and opt.lrShape == "multistep"
        assert ("milestones" in again) == is_default and "momentum" in again


@pytest.mark.parametrize(
    ("edit", "line", "milestones"),
    [
        (("nEpochs: 10", "nEpochs: 300"), "", [5, 8]),
        (("[5, 8]", "[7]"), "", [7]),
        (("[5, 8]", "[7]"), "--nEpochs 300", [7]),
    ],
)
def test_an_edited_copy_of_a_config_keeps_its_milestones_and_says_so(
    tmp_path, edit, line, milestones
):
    flag = written(tmp_path, "--nEpochs 10")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace(*edit))
    opt = parse(f"{flag} {line}")
    assert opt.milestones == milestones and "milestones" not in opts.default_names(opt)
    (note,) = opt.start_notes
    assert note.startswith(STAY.format(opt.nEpochs)) and "from epoch" in note


@pytest.mark.parametrize("value", ["{a: b}", "[[milestones]]", "!!python/name:os.system"])
def test_a_record_of_defaults_that_is_no_list_is_refused(tmp_path, value):
    (tmp_path / "c.yaml").write_text(f"depth: 40\ndefaults: {value}\n")
    with pytest.raises(UsageError, match=r"defaults is not a list of flags \(.*c.yaml, line 2\)"):
        parse(f"--config {tmp_path / 'c.yaml'}")


def test_a_record_of_defaults_may_name_flags_of_another_version(tmp_path):
    (tmp_path / "c.yaml").write_text("defaults: [gone, LR]\nLR: 0.2\ndepth: 40\n")
    parser = FlagParser(opts.FLAGS)
    parser.add(parser.parse_yaml(tmp_path / "c.yaml"))
    assert parser.values == {"LR": 0.2, "depth": 40} and parser.problems == []
    assert parser.defaults == {"gone", "LR"}
    ((what, _),) = _problems("--defaults LR")
    assert what == "unknown flag defaults (command line)"


def _problems(line: str):
    with pytest.raises(UsageError) as caught:
        parse(line)
    return caught.value.problems
