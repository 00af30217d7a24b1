"""Add the settings of config files, `--config` and a run's config.yaml, to a command line's."""

import os
from pathlib import Path

from cli.flag_reader import FlagParser
from cli.flag_types import as_text

# Three names of one setting.
MEMORY_ALIASES = ("optMemory", "shareGradInput", "optnet")


def add_file(parser: FlagParser, path: Path, exclude: tuple[str, ...] = ()) -> str:
    """Add the settings of a YAML file below those given so far.

    Milestones that were defaults when a run wrote the file are left out, and so defaults again, if
    the length or the shape given so far is another.

    Returns:
        What becomes of the milestones if the length is another: "follow" or "stay"; else "".
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
    follow = "milestones" in parser.defaults and (longer_or_shorter or reshaped)
    parser.add([line for line in raw if line[0] not in exclude + ("milestones",) * follow])
    return ("follow" if follow else "stay") * (longer_or_shorter and has_milestones)


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
        parser.values.setdefault("save", str(directory))
