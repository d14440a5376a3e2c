"""A suite of a few small runs, for the tests of suites."""

import yaml

SETTINGS = ["env=gaussian_mixture", "env.num_steps=4", "algo.updates=2", "eval_every=1"]
SETTINGS += ["algo.batch_size=8", "algo.micro_batch_size=8"]
ROWS = {"ctrl, gamma 1": ["algo=ctrl"], "reward only": ["algo=reward_backprop"]}
COLUMNS = {"gap (nats)": "exact/gap_nats", "TV": "exact/tv"}


def write(folder, **parts):
    path = folder / "mine.yaml"
    path.write_text(
        yaml.safe_dump({"rows": ROWS, "columns": COLUMNS, "settings": SETTINGS} | parts, sort_keys=False)
    )
    return path


def words(path, *more):
    return ["compare", f"suite={path}", "--root", str(path.parent / "cells"), *more]
