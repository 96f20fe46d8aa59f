"""Writes docs/support.md: the contract suite on a tiny model of each family. Takes a few minutes."""

import sys
from pathlib import Path

from vitrail.contract.tiny_models import FAMILIES, run_contract, support_page

PAGE = Path(__file__).parents[1] / "docs" / "support.md"


def main() -> None:
    """Measures every family and writes the page; a broken promise is an error."""
    rows = [run_contract(family) for family in FAMILIES]
    broken = [row.family.name for row in rows if not row.ok]
    if broken:
        sys.exit(f"The page was not written: {', '.join(broken)} break a promise.")
    PAGE.write_text(support_page(rows))


if __name__ == "__main__":
    main()
