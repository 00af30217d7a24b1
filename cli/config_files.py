"""Add the settings of config files, `--config` and a run's config.yaml, to a command line's."""

import os
from pathlib import Path

from cli.flag_reader import FlagParser
from cli.flag_types import as_text
from cli.milestones import default_milestones
from datasets.registry import SMALL_IMAGE

EARLIER_SETTINGS = {"resize": "antialias"}  # of runs of versions that had no such flag
# Three names of one setting.
MEMORY_ALIASES = ("optMemory", "shareGradInput", "optnet")


def add_file(parser: FlagParser, path: Path, exclude: tuple[str, ...] = ()) -> str:
    """Add the settings of a YAML file below those given so far.

    Milestones that were defaults when a run wrote the file are left out, and so defaults again, if
    the length or the shape given so far is another. In a new run those count as chosen that are not
    the defaults of the file's own length: somebody has edited one of the two.

    Returns:
        What becomes of milestones of another length: "follow" or "stay"; else "".
    """
    raw = parser.parse_yaml(path)
    for name, _, source in raw:
        if name == "config":
            what = f"config: a config file cannot name another ({source})"
            parser.problems.append((what, "put its lines here"))
    if parser.values.keys() & set(MEMORY_ALIASES):  # one name given earlier overrides all three
        exclude += MEMORY_ALIASES
    # Compare length and shape.
    texts = {name: value for name, value, _ in raw}
    longer_or_shorter, reshaped = (
        name in parser.values and texts.get(name, "") not in ("", as_text(parser.values[name]))
        for name in ("nEpochs", "lrShape")
    )
    has_milestones = "milestones" in texts.keys() - parser.values.keys()
    is_default, is_new = (
        "milestones" in parser.defaults,
        parser.values.get("resume", "none") == "none",
    )
    is_edited = is_default and is_new and not _has_default_milestones(texts)
    parser.defaults -= {"milestones"} if is_edited else set()
    follow = is_default and not is_edited and (longer_or_shorter or reshaped)
    parser.add([line for line in raw if line[0] not in exclude + ("milestones",) * follow])
    is_other_length = longer_or_shorter or is_edited
    return ("follow" if follow else "stay") * (is_other_length and has_milestones)


def _has_default_milestones(texts: dict[str, str]) -> bool:
    try:
        is_imagenet = int(texts["imageSize"]) > SMALL_IMAGE
        default = default_milestones(int(texts["nEpochs"]), is_imagenet, texts["netType"])
        return texts["milestones"] == as_text(default)
    except (KeyError, ValueError):  # it lacks one, or has one that is refused
        return True


def add_resumed(parser: FlagParser) -> None:
    """Add the config.yaml of the run that `--resume` names, and continue in its directory."""
    resume = parser.values.get("resume", "none")
    if resume in ("none", "auto"):
        return
    directory = Path(resume) if os.path.isdir(resume) else Path(resume).parent
    if os.path.isfile(directory / "config.yaml"):
        # The checkpoint knows the epoch; milestones are of the old shape, which may be another now.
        replaced = ("milestones",) if "lrShape" in parser.values else ()
        add_file(parser, directory / "config.yaml", exclude=("epochNumber", *replaced))
        for name, value in EARLIER_SETTINGS.items():
            parser.values.setdefault(name, value)
        parser.values.setdefault("save", str(directory))
