"""What each process of `test_processes` does: train as the command line says, one run after the other."""

import json
import sys

from diffrl.cli import main

for words in json.loads(sys.argv[1]):
    if code := main(words):
        sys.exit(code)
