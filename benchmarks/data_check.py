"""Time and memory of `tunesmith data check` on a large file.

    python benchmarks/data_check.py --gigabytes 2

Writes a JSONL file of made-up conversations to a temporary folder (2 % of them repeat, exactly or nearly), checks it
in a process of its own, and prints one JSON document: command, file_bytes, rows, seconds, peak_memory_bytes.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

CHECK = """
import json, resource, sys, time
from tunesmith.data.check import check_file
start = time.perf_counter()
report = check_file(sys.argv[1])
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
counts = report.as_dict()["problem_counts"]
print(json.dumps({"rows": report.rows, "seconds": seconds, "peak_memory_bytes": peak, "problem_counts": counts}))
"""
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
NUM_WORDS = 20_000
REPEATED_SHARE = 0.02


def write_rows(path: Path, *, num_bytes: int, seed: int) -> None:
    """Conversations of 30 to 150 words until the file has `num_bytes`."""
    chance = random.Random(seed)
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(NUM_WORDS)]
    earlier: list[tuple[list[str], list[str]]] = []
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < num_bytes:
            if earlier and chance.random() < REPEATED_SHARE:
                prompt, answer = map(list, chance.choice(earlier))
                if chance.random() < 0.5:
                    prompt[chance.randrange(len(prompt))] = "changed"
            else:
                prompt = chance.choices(words, k=chance.randint(20, 70))
                answer = chance.choices(words, k=chance.randint(10, 80))
            if len(earlier) < 10_000:
                earlier.append((prompt, answer))
            turns = (("user", prompt), ("assistant", answer))
            row = {"messages": [{"role": role, "content": " ".join(text)} for role, text in turns]}
            size += file.write(json.dumps(row) + "\n")


def main() -> None:
    """Make the file, check it, print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the file (10^9 bytes)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, num_bytes=int(options.gigabytes * 1e9), seed=options.seed)
        command = [sys.executable, "-c", CHECK, str(path)]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        document = {"command": " ".join(sys.argv), "file_bytes": path.stat().st_size} | result
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
