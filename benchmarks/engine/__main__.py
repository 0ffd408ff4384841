"""What ``launch`` starts: one engine. Arguments: its specification, the checkpoint, where its results go."""

import json
import os
import sys
from pathlib import Path

from benchmarks.engine.child import run
from benchmarks.engine.plan import from_dict
from tuner.measure.parent import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    specification, checkpoint, out = map(Path, sys.argv[1:])
    run(from_dict(json.loads(specification.read_text())), checkpoint, out)
    sys.stdout.flush()
    os._exit(0)  # all results are on disk; taking the engine down in order takes seconds
