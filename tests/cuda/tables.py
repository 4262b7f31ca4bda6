"""Write the tables of docs/cuda.md anew.

python tests/cuda/tables.py [traffic] [mutants] [instructions] [bounds] [compiled] [ledger]
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "cuda.md"
SCRIPTS = {
    "traffic": "traffic.py",
    "mutants": "mutants.py",
    "instructions": "instructions.py",
    "bounds": "bounds.py",
    "compiled": "compile_table.py",
    "ledger": "ledger.py",
}


def main(chosen: list[str]) -> int:
    """Run the scripts of the chosen tables; the exit status is theirs."""
    failed = 0
    for table in chosen or SCRIPTS:
        done = subprocess.run([sys.executable, HERE / SCRIPTS[table]], stdout=subprocess.PIPE, text=True, check=False)
        failed |= done.returncode
        old = re.compile(rf"<!-- {table} -->.*?<!-- end -->", re.S)
        new = f"<!-- {table} -->\n\n{done.stdout.strip()}\n\n<!-- end -->"
        PAGE.write_text(old.sub(lambda _, new=new: new, PAGE.read_text()))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
