"""Writes docs/configuration.md from the settings in elastic_daemon/config.py.

python scripts/config_doc.py            write docs/configuration.md
python scripts/config_doc.py --check    exit status 1 if it is not up to date
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from elastic_daemon.settings.settings_table import all_settings  # noqa: E402
from scripts.generated_page import write_or_check  # noqa: E402

TARGET = ROOT / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by scripts/config_doc.py from elastic_daemon/config.py: change the settings there, then run the script. -->

Flags of `elastic-daemon serve` win over environment variables, these over one TOML file that `--config` or
`ELASTIC_CONFIG` names. Any other flag of `serve` goes to vLLM ([flags.md](flags.md)). A wrong value ends the start with
exit status 2 and one line that names the flag, the variable, or the file with its line.

```console
$ elastic-daemon config            # each setting, and where it was given
$ elastic-daemon config --json
```

```toml
# what ELASTIC_CONFIG or --config names
model = "./model"
data_parallel_size = 6
survive_losses = 2
engine_flags = ["--max-model-len", "8192"]   # for vLLM
```

## Settings

*Live*: a reload (SIGHUP) applies a change in the file, and in files of keys; all other settings wait for a restart, and
so do all variables, since a process cannot read its environment anew. Secrets belong into files of their own, else into
the environment or the file: `ps` shows flags. Lists are arrays in the file; in a variable `ELASTIC_API_KEY` has commas
between keys, the others are split like a command line.

| in the file | flag | variable | value | default | live | |
|---|---|---|---|---|---|---|
"""


def render() -> str:
    """The text of docs/configuration.md."""
    return HEAD + "\n".join(_rows()) + "\n"


def _rows() -> Iterator[str]:
    for info in all_settings():
        flag = f"`{info.flag}`" if info.flag else "`MODEL`" if info.name == "model" else ""
        cells = (
            f"`{info.name}`",
            flag,
            f"`{info.variable}`" if info.variable else "",
            info.type.replace("|", "\\|"),
            info.default or "",
            "yes" if info.reloadable else "",
            info.help + (" (secret)" if info.secret else ""),
        )
        yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(write_or_check(__doc__, TARGET, render()))
