"""Writes the table of docs/coming-from-open-clip.md from `fastclip.train.open_clip_flags`.

python docs/make_open_clip.py            # writes it
python docs/make_open_clip.py --check    # status 1 if it is not what would be written
"""

import sys
from pathlib import Path

from fastclip.train.open_clip_flags import FLAGS, Flag

PAGE = Path(__file__).with_name("coming-from-open-clip.md")
HEADER = "| open_clip flag | here | what differs, or what to do instead |\n| --- | --- | --- |\n"


def row(flag: Flag) -> str:
    """A line of the table."""
    here: str = flag.status
    if flag.becomes:
        here = f"`{' '.join(flag.becomes).replace('=', ' ')}`"
    parts = [flag.text] if flag.text else []
    # what stands for an empty value is said nowhere else
    parts += [f"`{old}` becomes `{new}`" for old, new in flag.values.items() if old]
    for reason in dict.fromkeys(flag.refused.values()):
        values = ", ".join(f"`{value}`" for value, why in flag.refused.items() if why == reason)
        parts.append(f"not {values}: {reason}")
    return f"| `--{flag.name}` | {here} | {'; '.join(parts)} |\n"


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(HEADER)
    after = rest.partition("\n\n")[2]
    return before + HEADER + "".join(map(row, FLAGS)) + "\n" + after


def main() -> int:
    """Write the page, or compare it; the exit status."""
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
