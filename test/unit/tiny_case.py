"""Command, for scripts that only show that something runs: writes a tiny teacher, student and SST-2 folder.

python test/unit/tiny_case.py FOLDER       # makes FOLDER/teacher, FOLDER/student, FOLDER/data
"""

import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from cases import Golden

    place = Golden("sst2_small").workplace(Path(sys.argv[1]))
    shutil.copy(place.data / "train.tsv", place.data / "train_aug.tsv")
