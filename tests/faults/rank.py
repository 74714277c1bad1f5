"""A rank of a wounded training: started by megamm.launch with the arguments of megamm.train.

FAULT is a JSON list: where rank 0 notes its steps, who is wounded, the function of wounds.py and its arguments. Wounds
are of the first attempt only, except those that stand in the way of every attempt.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import wounds
from injection import note_steps

import megamm.train

torch.set_num_threads(1)
steps, rank, name, *arguments = json.loads(os.environ["FAULT"])
if os.environ["RANK"] == "0":
    note_steps(Path(steps))
is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if int(os.environ["RANK"]) == rank and (is_first or name in wounds.LASTING):
    getattr(wounds, name)(*arguments)
megamm.train.command()
