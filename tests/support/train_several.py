"""A member of a gang that runs one training after another: libraries take longer to import than a small one takes.

``python train_several.py training-1.json training-2.json …``, with the environment of a gang.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch.distributed

from aidocks.training.process import main

# As under Ray Train, the group is there before the training and stays after it.
torch.distributed.init_process_group("gloo")
for path in sys.argv[1:]:
    code = main([str(Path(path))])
    if code:
        sys.exit(code)
    # Every training has Python look for garbage, which takes longer than the training where the libraries count, too.
    gc.freeze()
