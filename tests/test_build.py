import time
from concurrent.futures import ThreadPoolExecutor

import torch

from diffrl import config
from diffrl.build import Setup


def test_of_two_that_want_the_same_classifier_one_fits_it(tiny_path, monkeypatch):
    words = [f"env.model={tiny_path}", "env.num_steps=2", "reward.num_pictures=40", "reward.num_classes=2"]
    setups = [Setup(config.load(words)) for _ in range(2)]
    drawn = []

    def slowly(setup, policy, count):
        drawn.append(count)
        time.sleep(0.5)  # long enough for the other to come
        return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(Setup, "_draw", slowly)
    with ThreadPoolExecutor(2) as pool:
        rewards = list(pool.map(lambda setup: setup.make_reward(setup.make_policy((2,))), setups))
    assert drawn == [40]
    first, second = (reward.attributes[0].edges.tolist() for reward in rewards)
    assert first == second
