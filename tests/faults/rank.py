"""A rank of a wounded training: started by megamm.launch with the arguments of megamm.train.

FAULT says who is wounded, and only in the first attempt: a JSON list of rank, function of wounds.py and its arguments.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import wounds

import megamm.train

torch.set_num_threads(1)
rank, name, *arguments = json.loads(os.environ["FAULT"])
if int(os.environ["RANK"]) == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    getattr(wounds, name)(*arguments)
megamm.train.command()
