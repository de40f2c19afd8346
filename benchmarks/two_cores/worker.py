"""One contestant in a process of its own; prints {"seconds": of a batch} or {"unavailable": why} as its last line.

python benchmarks/two_cores/worker.py CONTESTANT '{"name": "vgg", "batches": 8}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from contestants import CONTESTANTS
from entry import Entry, Unavailable


def main() -> None:
    contestant, entry = CONTESTANTS[sys.argv[1]], Entry(**json.loads(sys.argv[2]))
    torch.set_num_threads(contestant.threads)
    try:
        outcome = {"seconds": contestant.run(entry)}
    except Unavailable as reason:
        outcome = {"unavailable": str(reason)}
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
